"""Sums what a pass through a pipeline leaves at its places."""

from typing import Any

import jax
import numpy as np

from deepseek_jax.pipeline import stages as cutting
from deepseek_jax.pipeline.one_pass import Place, add

_add = jax.jit(add, donate_argnums=0)


def summed(pipeline: Any, totals: dict[Place, dict]) -> tuple[dict, ...]:
  """Sums gradients by stage, where it lies, with those of its copies.

  Args:
    pipeline: the Pipeline of the pass.
    totals: by place.
  """
  last = len(pipeline.stages) - 1
  out = []
  for number in range(last + 1):
    place, other = Place(number, number), Place(last - number, number)
    total = totals[place]
    if other != place and other in totals:
      total = _plus(pipeline, place, total, totals[other])
    out.append(dict(total))
  # The last stage's copy of the embedding is a parameter of the first.
  if last and pipeline.stages[last].embed:
    more = {'embed': out[last].pop('embed')}
    first = {'embed': out[0]['embed']}
    out[0] |= _plus(pipeline, Place(0, 0), first, more)
  return tuple(out)


def _plus(pipeline: Any, place: Place, total: dict, more: dict) -> dict:
  """Adds gradients of another place to those of `place`, which are donated."""
  return _add(total, jax.device_put(more, pipeline.totals_where(place, more)))


def metrics(pipeline: Any, found: dict[Place, list]) -> dict:
  """Sums the metrics of chunks, by place, to those of `loss_and_metrics`."""
  by_stage = {}
  for place, chunks in found.items():
    by_stage.setdefault(place.stage, []).extend(jax.device_get(chunks))
  sums = [
    jax.tree.map(lambda *a: sum(a[1:], a[0]), *by_stage[i])
    for i in sorted(by_stage)
  ]
  loads = [cutting.nested(s.pop('loads'), '/') for s in sums]
  out = {'loads': cutting.flat(pipeline.join(loads), '/')}
  for name in dict.fromkeys(name for stage in sums for name in stage):
    values = [stage[name] for stage in sums if name in stage]
    # Scalars are shares of a sum; what has axes has one of layers.
    per_layer = np.ndim(values[0]) > 0
    join = np.concatenate if per_layer else lambda v: sum(v[1:], v[0])
    out[name] = join(values)
  if 'recall' in out:
    # Stages sent sums over their layers: the mean is over all of them.
    out['recall'] = out['recall'] / out.pop('sparse_layers')
  return out
