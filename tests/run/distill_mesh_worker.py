"""Distillation on meshes, against one device.

    python -m tests.run.distill_mesh_worker CASE...

Prints by mesh: whether the batches have the same tokens, and the largest gaps
of the teachers' states and of the parameters after some steps.
"""

import json
import os
import sys

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run import sources
from deepseek_jax.run.steps import Steps
from tests.rl import taught
from tests.run import rollouts_mesh_worker
from tests.run.staged_worker import RECIPE, SMOOTH, gap

STEPS, ROWS = 3, 8
CASES = {
  'context 2': ds.MeshConfig(context=2),
  'fsdp 2 data 2': ds.MeshConfig(fsdp=2, data=2),
  **{
    name: rollouts_mesh_worker.CASES[name]
    for name in ('data 2', 'data 2 tensor 2')
  },
}


def config(folder: str, mesh: ds.MeshConfig, sampled: bool) -> ds.RunConfig:
  """Returns a run on conversations, or on the student's own answers.

  Args:
    folder: `taught.folder()`.
    mesh: of student and teacher.
    sampled: on its own answers.
  """
  own = ds.RolloutConfig(prompts=4, group=2, most=6, slots=8)
  return taught.config(
    os.path.join(folder, 'task.json' if sampled else 'chats.jsonl'),
    **{
      'objective': ds.DistillConfig(
        beta=0.5, teachers={os.path.join(folder, 'teacher'): 1.0}
      ),
      'rollouts': own if sampled else None,
      'train.optimizer': SMOOTH,
      'train.schedule': RECIPE.schedule,
      'mesh': mesh,
    },
  )


def run(mesh: ds.MeshConfig, sampled: bool):
  """Returns the last parameters and the batches."""
  cfg = config(taught.folder(), mesh, sampled)
  store = sources.opened(cfg, lambda line: None)
  batches, seen = sources.batches(store, cfg), []
  steps = Steps(ds.build(cfg.model), cfg)
  state = steps.begin()
  for _ in range(STEPS):
    batches.see(lambda s=state: steps.variables(s))
    seen.append(batches.next(ROWS, *steps.block(ROWS)))
    state, _ = steps(state, steps.batch(seen[-1], ROWS), NoMetrics())
  return jax.device_get(state.params), seen


def main(names):
  out = {}
  for name in names:
    for sampled in (False, True):
      if sampled and CASES[name].context > 1:
        continue
      want, batches = run(ds.MeshConfig(), sampled)
      params, seen = run(CASES[name], sampled)
      pairs = list(zip(seen, batches))
      said = [
        float(np.abs(a['teacher_hidden'] - b['teacher_hidden']).max())
        for a, b in pairs
      ]
      same = [np.array_equal(a['tokens'], b['tokens']) for a, b in pairs]
      out[f'{name}, {"own answers" if sampled else "conversations"}'] = {
        'same': all(same),
        'params': gap(params, want),
        'said': max(said),
      }
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1:] or list(CASES))
