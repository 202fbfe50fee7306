"""Serves with redundant experts: copies of busy ones on further devices.

DeepSeek-V3 (arXiv:2412.19437, section 3.4): from the load of the last minutes
experts are copied and laid out anew; a token takes one of the copies of each
expert that it chose, in turn. No number changes.
Legend: L MoE layers, E experts, R copies of experts in all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config_changes import changed
from deepseek_jax.errors import InputError
from deepseek_jax.infer import eplb
from deepseek_jax.model.transformer_config import TransformerConfig


def places(config: TransformerConfig) -> list[tuple]:
  """Returns (path of a stack of MoE layers, their numbers among L), MTP last.

  The numbers [repeats] are None for MTP blocks, which are not stacked.
  """
  stacks: dict[tuple, list[int]] = {}
  routed = (layer for layer in config.in_order() if layer.block.routed)
  for number, layer in enumerate(routed):
    path = ('segments', layer.segment, layer.place, 'ffn')
    stacks.setdefault(path, []).append(number)
  out = [(path, np.array(numbers)) for path, numbers in stacks.items()]
  if config.mtp.depth and config.block(config.mtp.block).routed:
    paths = [('mtp', k, 'block', 'ffn') for k in range(config.mtp.depth)]
    out += [(path, None) for path in paths]
  return out


def _at(tree: dict, path: tuple) -> dict:
  """Returns the dict at a path of nested dicts, made where it is missing."""
  for key in path:
    tree = tree.setdefault(key, {})
  return tree


def with_copies(
  config: TransformerConfig,
  variables: dict,
  load: np.ndarray,
  redundant: int,
  *,
  nodes: int = 1,
  devices: int = 1,
) -> tuple[TransformerConfig, dict]:
  """Returns a model that serves with copies of its busiest experts.

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
    # Each stack is placed by itself; a model has as many copies in every layer.
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


def _copy(
  params: dict,
  buffers: dict,
  placing: eplb.Placing,
  redundant: int,
  *,
  stacked: bool,
) -> None:
  """Lays one stack of layers out as `placing` says."""
  # An expert has at most redundant + 1 copies: one shape for all stacks.
  room = redundant + 1 - placing.copies.shape[-1]
  copies = np.pad(placing.copies, ((0, 0), (0, 0), (0, room)))
  arrays = placing.expert, np.maximum(copies, 0), placing.counts
  if not stacked:
    arrays = tuple(a[0] for a in arrays)
  expert, copies, counts = (jnp.asarray(a, jnp.int32) for a in arrays)
  pick = lambda w, e: w[e]
  for name in ('gate_up', 'down'):
    # [L E ...] -> [L R ...]: the weights of every copy.
    take = jax.vmap(pick) if stacked else pick
    params[name] = take(params[name], expert)
  buffers['copies'], buffers['copy_count'] = copies, counts
