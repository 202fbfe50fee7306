"""A step of GRPO on several devices and in micro-batches, against one of each.

python -m tests.rl.grpo_worker [CASE...]
"""

import json
import sys

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.rl import grpo
from deepseek_jax.run.staged_steps import StagedSteps
from deepseek_jax.run.steps import Steps
from tests import tiny
from tests.rl import rollouts
from tests.run.staged_worker import RECIPE, gap

B, T, PADDING = 8, 12, 4
OBJECTIVE = grpo.GRPOConfig(
  clip_high=0.28, kl='ratio_k3', kl_weight=0.1, off_policy_bound=0.05
)
# name: mesh, micro-batches
CASES = {
  **{f'{n} devices': (ds.MeshConfig(data=n), 1) for n in (2, 4, 8)},
  **{f'{n} micro-batches': (ds.MeshConfig(), n) for n in (2, 4)},
  'pipeline': (ds.MeshConfig(stage=2), 2),
}


def steps_of(mesh, micro_batches, length):
  recipe = ds.changed(
    RECIPE,
    {
      'batch.size': B,
      'batch.accumulate': micro_batches,
      'tokens': 4 * B * length,
    },
  )
  config = ds.RunConfig(
    tiny.config('llama'),
    ds.DataConfig(vocab_size=tiny.VOCAB, seq_len=length, cross_document=False),
    recipe,
    objective=OBJECTIVE,
    mesh=mesh,
  )
  made = StagedSteps if mesh.stage > 1 else Steps
  return made(tiny.model('llama'), config)


def step(mesh, micro_batches, batch):
  length = batch['tokens'].shape[1] - 1
  steps = steps_of(mesh, micro_batches, length)
  fresh = jax.device_get(steps.whole(steps.begin()))
  # A copy, for the step is given its state away.
  params = jax.tree.map(np.asarray, tiny.variables('llama')['params'])
  state = steps.adopt(fresh._replace(params=params))
  state, metrics = steps(state, steps.batch(batch, B), NoMetrics())
  return jax.device_get(steps.whole(state)), jax.device_get(metrics)


def main(names):
  model, variables = tiny.model('llama'), tiny.variables('llama')
  batch = rollouts.batch(model, variables, B, T + 1)
  want, told = step(ds.MeshConfig(), 1, batch)
  order = np.random.default_rng(0).permutation(B)
  shuffled = {k: v[order] for k, v in batch.items()}
  out = {}
  # What padding holds is nothing to any other token.
  wide = lambda a: np.pad(a, [(0, 0), (0, PADDING)], constant_values=0)
  padded = {k: wide(v) for k, v in batch.items()}
  padded['tokens'][:, T + 1 :] = 7
  changed = {'another order': shuffled, 'more padding': padded}
  cases = CASES | dict.fromkeys(changed, (ds.MeshConfig(), 1))
  for name in names or cases:
    mesh, micro_batches = cases[name]
    given = changed.get(name, batch)
    state, metrics = step(mesh, micro_batches, given)
    norms = lambda m: {
      k: v for k, v in m.items() if 'norms' not in k and k != 'block_norms'
    }
    out[name] = {
      'params': gap(state.params, want.params),
      'metrics': gap(norms(metrics), norms(told)),
    }
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1:])
