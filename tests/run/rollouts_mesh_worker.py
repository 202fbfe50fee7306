"""Rollouts and steps of GRPO on meshes, against one device.

    python -m tests.run.rollouts_mesh_worker CASE...

Prints by mesh: whether the answers are the same, the largest gap of parameters
and of the log-probs in the batches, and whether the engine has the very buffers
that the trainer has.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run import sources
from deepseek_jax.run.steps import Steps
from tests.faults import rollouts_task, rollouts_worker
from tests.run.staged_worker import RECIPE, SMOOTH, gap

STEPS, ROWS = 4, 8  # two rounds of two updates
CASES = {
  'data 2': ds.MeshConfig(data=2),
  'expert 2': ds.MeshConfig(expert=2),
  'fsdp 2 expert 2': ds.MeshConfig(fsdp=2, expert=2),
  'data 2 tensor 2': ds.MeshConfig(
    data=2,
    tensor=2,
    rules=ds.MeshConfig().rules | {'vocab': None},  # 261 is odd
  ),
  'expert 8': ds.MeshConfig(expert=8),
  'data 2 fsdp 2 expert 2': ds.MeshConfig(data=2, fsdp=2, expert=2),
}


def run(folder: Path, mesh: ds.MeshConfig):
  """Returns the last state, the batches, and whether buffers are shared."""
  config = ds.changed(
    rollouts_worker.config(folder),
    {
      'mesh': mesh,
      'train.optimizer': SMOOTH,
      'train.schedule': RECIPE.schedule,
      'objective.router_bias': 'updated',
    },
  )
  store = sources.opened(config, lambda line: None)
  batches, seen, shared = sources.batches(store, config), [], []
  model = ds.build(config.model)
  steps = Steps(model, config)
  state = steps.begin()
  for number in range(STEPS):
    batches.see(lambda s=state: steps.variables(s))
    seen.append(batches.next(ROWS, *steps.block(ROWS)))
    if number % 2 == 0:  # a round was drawn
      held = batches._answerer._engine._variables
      pairs = zip(*map(jax.tree.leaves, (held, steps.variables(state))))
      shared += [a is b for a, b in pairs]
    batch = steps.batch(seen[-1], ROWS)
    state, _ = steps(state, batch, NoMetrics())
  return jax.device_get(state), seen, all(shared)


def main(names):
  folder = Path(tempfile.mkdtemp())
  rollouts_task.write_task(folder)
  want, batches, _ = run(folder, ds.MeshConfig())
  out = {}
  for name in names:
    state, seen, shared = run(folder, CASES[name])
    told = [
      max(float(np.abs(a[n] - b[n]).max()) for n in ('old', 'reference'))
      for a, b in zip(seen, batches)
    ]
    out[name] = {
      'same': all(
        np.array_equal(a['tokens'], b['tokens']) for a, b in zip(seen, batches)
      ),
      'params': gap(state.params, want.params),
      'biases': gap(state.buffers, want.buffers),
      'log_probs': max(told),
      'shared': shared,
    }
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1:] or list(CASES))
