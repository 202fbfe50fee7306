"""Names the numbers of a state or a step that are not finite, and a way out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.train.step import TrainState

_SHOWN = 3


def not_finite(tree: Any) -> list[str]:
  """Returns the dotted names of arrays that hold a number that is not finite.

  All processes of a run call it, for arrays that lie on devices of several.
  """
  arrays = {
    name: leaf
    for name, leaf in flatten(tree).items()
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  }
  if all(isinstance(leaf, np.ndarray) for leaf in arrays.values()):
    sound = {n: np.isfinite(leaf).all() for n, leaf in arrays.items()}
  else:
    sound = jax.device_get(_sound(arrays))
  return [name for name in arrays if not sound[name]]


@jax.jit
def _sound(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns whether each array is finite, by name."""
  return {name: jnp.isfinite(a).all() for name, a in arrays.items()}


def of_checkpoint(state: TrainState, where: Path) -> str:
  """Returns a line on what a restored state holds that is not finite, or ''.

  Args:
    state: as it was restored.
    where: the folder of the step.
  """
  params, moments = not_finite(state.params), not_finite(state.moments)
  if not params and not moments:
    return ''
  found = _listed({'moments': moments, 'parameters': params})
  way = f'remove {where} to go on from the step before'
  if not params:
    way += f', or {_fresh_moments(where.parents[1])}'
  return (
    f'{where} is not finite in {found}: updates that come of it are refused,'
    f' however often the run is started; {way}'
  )


def of_refused(metrics: Mapping, state: TrainState, workdir: Path) -> str:
  """Returns why updates stay refused, and how to go on.

  Args:
    metrics: of the last step, on the host.
    state: after it.
    workdir: of the run.
  """
  params, moments = not_finite(state.params), not_finite(state.moments)
  gradients = _blocks(metrics['block_norms'])
  updates = _blocks(metrics['update_norms'])
  kinds = {
    'parameters': params,
    'moments': moments,
    'gradients of': gradients,
    'updates of': updates,
  }
  found = _listed(kinds)
  cause = f'not finite are {found}' if found else 'all numbers are finite'
  again = (
    'a refused update leaves weights and moments as they are, so the same'
    ' command ends here again'
  )
  # Damaged moments alone can turn a finite gradient into such an update.
  if moments or (updates and not gradients):
    return f'{cause}; {again}: {_fresh_moments(workdir)}'
  return (
    f'{cause}; {again}: a larger --config.train.gate.patience goes past these'
    f' batches, and experiments.replay --workdir={workdir} shows them'
  )


def _fresh_moments(workdir: Path) -> str:
  """Returns the advice to begin again with this run's weights."""
  return (
    'begin a run with its weights and fresh moments, by another --workdir and'
    f' --config.init_from={workdir}'
  )


def _blocks(norms: Mapping) -> list[str]:
  """Returns the names of the blocks whose norm is not finite."""
  return [name for name, norm in norms.items() if not np.isfinite(norm).all()]


def _listed(kinds: Mapping[str, list[str]]) -> str:
  """Returns names by kind: 'moments a, b, c and 2 more; gradients of d'."""
  parts = []
  for kind, names in kinds.items():
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    if names:
      parts.append(f'{kind} {", ".join(names[:_SHOWN])}{more}')
  return '; '.join(parts)
