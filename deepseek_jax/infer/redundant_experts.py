"""Serving with redundant experts: copies of busy ones on further devices.

DeepSeek-V3 (arXiv:2412.19437, section 3.4): from the load of the last minutes
experts are copied and laid out anew; a token takes one of the copies of each
expert that it chose, in turn. No number changes.
Legend: L MoE layers, E experts, R copies of experts in all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import changed
from deepseek_jax.errors import InputError
from deepseek_jax.infer import eplb


def places(config) -> list[tuple]:
  """((path of a stack of MoE layers), their numbers among L), MTP last."""
  out, number = [], 0
  for i, segment in enumerate(config.segments()):
    sparse = [j for j, b in enumerate(segment.blocks) if _is_sparse(b)]
    count = len(sparse)
    for at, j in enumerate(sparse):
      numbers = number + at + count * np.arange(segment.repeat)
      out.append((('segments', i, j, 'ffn'), numbers))
    number += count * segment.repeat
  if config.mtp.depth and _is_sparse(config.block(config.mtp.block)):
    paths = [('mtp', k, 'block', 'ffn') for k in range(config.mtp.depth)]
    out += [(path, None) for path in paths]
  return out


def _is_sparse(block) -> bool:
  return hasattr(block.ffn, 'experts')


def _at(tree: dict, path) -> dict:
  for key in path:
    tree = tree.setdefault(key, {})
  return tree


def with_copies(
  config, variables, load, redundant: int, *, nodes: int = 1, devices: int = 1
):
  """A model that serves with copies of its busiest experts.

  Args:
    config: a TransformerConfig without redundant experts.
    variables: of it.
    load: [L E], tokens that chose each expert, layers in order. MTP blocks,
      whose load nobody counts at inference, count as evenly used.
    redundant: copies beyond one of each; E + redundant is a multiple of
      devices.
    nodes, devices: over which the experts are spread.

  Returns:
    (configuration, variables) of the same function.

  Raises:
    InputError: sizes that do not fit.
  """
  if config.moe is None or config.moe.redundant:
    raise InputError('config.moe: must be sparse, without redundant experts')
  if redundant < 1:
    raise InputError(f'redundant = {redundant}: must be at least 1')
  E, groups = config.moe.experts, getattr(config.moe.router, 'groups', 1)
  load = np.asarray(load, np.float64)
  out = jax.tree.map(lambda a: a, variables)  # a copy of the dicts
  for path, numbers in places(config):
    rows = np.ones((1, E)) if numbers is None else load[numbers]
    placing = eplb.rebalance_experts(
      rows, E + redundant, groups, nodes, devices
    )
    _copy(
      _at(out['params'], path),
      _at(out['buffers'], path),
      placing,
      redundant,
      stacked=numbers is not None,
    )
  return changed(config, {'moe.redundant': redundant}), out


def _copy(params, buffers, placing, redundant, *, stacked: bool):
  """Lays one stack of layers out as `placing` says."""
  room = redundant + 1 - placing.copies.shape[-1]
  copies = np.pad(placing.copies, ((0, 0), (0, 0), (0, room)))
  arrays = placing.expert, np.maximum(copies, 0), placing.counts
  if not stacked:
    arrays = tuple(a[0] for a in arrays)
  expert, copies, counts = (jnp.asarray(a, jnp.int32) for a in arrays)
  pick = lambda w, e: w[e]
  for name in ('gate_up', 'down'):
    take = jax.vmap(pick) if stacked else pick
    params[name] = take(params[name], expert)
  buffers['copies'], buffers['copy_count'] = copies, counts
