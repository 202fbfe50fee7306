"""A pipeline against the same model in one piece; prints what differs.

python -m tests.pipeline.pipeline_worker CASE...
"""

import functools
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.pipeline import chunk_orders as schedules
from deepseek_jax.pipeline.pipeline import Pipeline
from deepseek_jax.train import step as train
from deepseek_jax.train.step import Shares
from tests import tiny

T, WEIGHT = 12, 0.3
# name: model, mesh axes, schedule, sequences, rules
CASES = {
  '1f1b_2': ('step', {'stage': 2}, ('one_f_one_b', 2, 4), 8, {}),
  '1f1b_4': ('v3', {'stage': 4}, ('one_f_one_b', 4, 6), 6, {}),
  'dualpipe_2': ('dense_mtp', {'stage': 2}, ('dualpipe', 2, 4), 4, {}),
  'dualpipe_4': ('v3', {'stage': 4}, ('dualpipe', 4, 10), 10, {}),
  'cut_pattern': ('mixed', {'stage': 4}, ('one_f_one_b', 4, 4), 4, {}),
  'one_stage': ('step', {'stage': 1}, ('one_f_one_b', 1, 2), 4, {}),
  'sharded': (
    'v3',
    {'data': 2, 'stage': 2, 'fsdp': 2},
    ('one_f_one_b', 2, 2),
    8,
    {'batch': ('data', 'fsdp'), 'embed': 'fsdp'},
  ),
}


@functools.cache
def whole(name, rows, cross_document):
  """Metrics and gradient of the model in one piece, in one program."""
  model, batch = tiny.model(name), tiny.documents(rows, T + 1, 0, 5)
  if cross_document:
    batch = tiny.together(batch)
  weights = tiny.PRETRAINING.inputs(batch).weights
  shares = Shares(np.float32(weights.sum()), 1, np.float32(WEIGHT))

  @jax.jit
  def gradient(params, buffers, batch):
    loss = lambda params: train.loss_and_metrics(
      model,
      {'params': params, 'buffers': buffers},
      batch,
      shares,
      tiny.PRETRAINING,
    )
    return jax.grad(loss, has_aux=True)(params)

  held = tiny.variables(name)
  grads, metrics = gradient(held['params'], held['buffers'], batch)
  return batch, grads, metrics


def error(got, want) -> float:
  """The largest difference of two trees, by the largest value of its leaf."""
  ratios = jax.tree.map(
    lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-6),
    jax.device_get(got),
    jax.device_get(want),
  )
  return tiny.largest(jax.tree.leaves(ratios))


def case(name: str) -> dict:
  model, axes, (schedule, *sizes), rows, rules = CASES[name]
  cross_document = name == '1f1b_4'
  batch, grads, metrics = whole(model, rows, cross_document)
  devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
  pipeline = Pipeline(
    tiny.config(model),
    Mesh(devices.reshape(*axes.values()), tuple(axes)),
    getattr(schedules, schedule)(*sizes),
    rules=rules,
  )
  held = pipeline.split(tiny.variables(model))
  copied = pipeline.copied(held)
  got, found = pipeline.gradients(held, batch, WEIGHT)
  counts = {'load', 'dropped', 'loads'}
  same = all(
    jax.tree.all(jax.tree.map(np.array_equal, found[k], dict(metrics)[k]))
    for k in counts & set(metrics)
  )
  return {
    'keys': sorted(found) == sorted(metrics),
    'gradient': error(pipeline.join(got), grads),
    'scalars': error(
      {k: found[k] for k in set(found) - counts},
      {k: metrics[k] for k in set(metrics) - counts},
    ),
    'counts_equal': same,
    'round_trip': error(
      {k: pipeline.join([v[k] for v in held]) for k in ('params', 'buffers')},
      tiny.variables(model),
    ),
    'places': [list(p) for p in pipeline.places],
    'devices': [
      sorted({d.id for a in jax.tree.leaves(copied[p]) for d in a.devices()})
      for p in pipeline.places
    ],
  }


if __name__ == '__main__':
  print(json.dumps({name: case(name) for name in sys.argv[1:]}))
