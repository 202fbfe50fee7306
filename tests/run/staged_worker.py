"""Steps through a pipeline against steps of one program; prints what differs.

python -m tests.run.staged_worker CASE...
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.staged_steps import StagedSteps
from deepseek_jax.run.steps import Steps
from deepseek_jax.train import step as train
from deepseek_jax.train.gate import GateConfig
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)
from tests import tiny

B, T, STEPS = 4, 12, 2
# Smooth in the gradient: with a tiny eps, Adam divides rounding by rounding.
SMOOTH = OptimizerConfig(eps=1e-3, decay=0.01)
RECIPE = train.TrainConfig(
  tokens=4 * B * T,
  batch=BatchConfig(B, accumulate=2),
  optimizer=SMOOTH,
  schedule=ScheduleConfig('constant', peak=0.01, warmup=0),
  gate=GateConfig(warmup=1000),
  mtp_weight=SwitchConfig(0.3, 0.1, 0.2),  # both in two steps
  bias_rate=SwitchConfig(0.01, 0.0, 0.9),
)
MUON = dataclasses.replace(SMOOTH, muon=MuonConfig())
TWO = MeshConfig(stage=2)
# name: model, mesh, changes of the recipe
CASES = {
  'stage=2': ('step', TWO, {}),
  'tied': ('dense_mtp', TWO, {}),
  'cut pattern': ('mixed', MeshConfig(stage=4), {'batch.accumulate': 4}),
  'bfloat16': ('step', TWO, {'optimizer.moments': 'bfloat16'}),
  'muon': ('step', TWO, {'optimizer': MUON}),
  'a part': ('sparse', TWO, {'trainable': ('indexer',)}),
  'all of it': ('sparse', TWO, {}),
  'skipped': ('step', TWO, {'gate.warmup': 1}),
}


@functools.cache
def model(name: str) -> ds.Model:
  if name != 'sparse':
    return tiny.model(name)
  config = ds.changed(
    ds.presets.v32_tiny(),
    {
      'vocab_size': tiny.VOCAB,
      'dim': tiny.DIM,
      'layout': ((('dense',), 1), (('moe',), 2)),
      'ffn.width': 16,
      'moe.width': 8,
      'attention.top_k': 4,
    },
  )
  return ds.build(config)


def begun(case: str, fresh: train.TrainState) -> train.TrainState:
  """A state like a fresh one, whose weights all matter."""
  one = lambda a: np.asarray(a) * (0.5 if a.ndim > 1 else 1.0)
  variables = jax.tree.map(one, tiny.draw(model(CASES[case][0])))
  state = fresh._replace(**variables)
  if case == 'skipped':  # all batches seem to explode
    seen = {'mean': np.full(2, 1e-3, 'f'), 'accepted': np.int32(1)}
    state = state._replace(gate=state.gate._replace(**seen))
  return state


def run(steps, state):
  """-> metrics of some steps, the last state as a checkpoint has it."""
  seen, writer = [], NoMetrics()
  for seed in range(STEPS):
    batch = steps.batch(tiny.documents(B, T + 1, seed, 3), B)
    state, metrics = steps(state, batch, writer)
    seen.append(jax.device_get(metrics))
  return seen, jax.device_get(steps.whole(state))


def gap(a, b) -> float:
  """Greatest difference of two trees, each leaf over its greatest value."""

  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)

  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
  return float(max((one(*pair) for pair in pairs), default=0))


def exact(tree) -> dict:
  """What counts; all else is rounded."""
  kind = lambda a: np.asarray(a).dtype.kind
  return {k: v for k, v in tree.items() if kind(jax.tree.leaves(v)[0]) != 'f'}


def case(name: str) -> dict:
  key, mesh, changes = CASES[name]
  config = RunConfig(
    model(key).config,
    datalib.DataConfig(vocab_size=tiny.VOCAB, seq_len=T, cross_document=False),
    ds.changed(RECIPE, changes),
  )
  one = Steps(model(key), config)
  many = StagedSteps(model(key), dataclasses.replace(config, mesh=mesh))
  # Copies: the steps take away what they are given.
  fresh = jax.tree.map(np.array, (many.whole(many.begin()), one.begin()))
  seen, got = run(many, many.adopt(begun(name, fresh[0])))
  wanted, want = run(one, jax.device_put(begun(name, fresh[1])))
  shapes = lambda s: [(a.shape, a.dtype) for a in jax.tree.leaves(s)]
  return {
    'metrics': [sorted(s) for s in seen] == [sorted(w) for w in wanted],
    'form': jax.tree.structure(got) == jax.tree.structure(want)
    and shapes(got) == shapes(want),
    'begun': gap(*fresh),
    'counts': tiny.largest(
      gap(exact(s), exact(w)) for s, w in zip(seen, wanted)
    ),
    'scalars': {
      k: tiny.largest(gap(s[k], w[k]) for s, w in zip(seen, wanted))
      for k in wanted[0]
    },
    'params': gap(got.params, want.params),
    'moments': gap(got.moments, want.moments),
    'buffers': gap(got.buffers, want.buffers),
    'moved': gap(want.buffers, fresh[1].buffers),
    'gate': gap(got.gate, want.gate),
    'counters': [int(got.step), int(got.sequences)],
    'skipped': int(want.gate.skipped),
  }


if __name__ == '__main__':
  print(json.dumps({name: case(name) for name in sys.argv[1:]}))
