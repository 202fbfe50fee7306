"""A user's own objective on a mesh and through a pipeline, against one device.

python -m tests.train.objective_worker CASE...
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp

import deepseek_jax as ds
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run.staged_steps import StagedSteps
from deepseek_jax.run.steps import Steps
from tests import tiny
from tests.run import staged_worker
from tests.run.staged_worker import B, T, gap


@dataclasses.dataclass(frozen=True)
class LabelSmoothing:
  """Cross entropy against labels that share `amount` with all tokens."""

  amount: float = 0.1

  def build(self, model):
    def loss(predictions, inputs, shares):
      logits = predictions.hidden @ predictions.head
      log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
      right = jnp.take_along_axis(log_p, inputs.labels[..., None], -1)[..., 0]
      value = (1 - self.amount) * right + self.amount * log_p.mean(-1)
      total = lambda v: -(v * inputs.weights).sum() / shares.denominator
      return total(value), {'right': total(right)}

    right = {'right': ds.Metric('Loss of the right token', 'nats')}
    return ds.Objective(loss, metrics=right, mtp=False)


CASES = {
  'mesh': ds.MeshConfig(data=2),
  'pipeline': ds.MeshConfig(stage=2),
}


def config(mesh: ds.MeshConfig) -> ds.RunConfig:
  data = ds.DataConfig(vocab_size=tiny.VOCAB, seq_len=T, cross_document=False)
  return ds.RunConfig(
    staged_worker.model('step').config,
    data,
    staged_worker.RECIPE,
    objective=LabelSmoothing(0.2),
    mesh=mesh,
  )


def step(mesh: ds.MeshConfig):
  """Returns the state after a step and its metrics, on the host."""
  made = StagedSteps if mesh.stage > 1 else Steps
  steps = made(staged_worker.model('step'), config(mesh))
  fresh = jax.device_get(steps.whole(steps.begin()))
  state = steps.adopt(staged_worker.begun('stage=2', fresh))
  batch = steps.batch(tiny.documents(B, T + 1, 0, 3), B)
  state, metrics = steps(state, batch, NoMetrics())
  return jax.device_get(steps.whole(state)), jax.device_get(metrics)


def main(names):
  want, out = step(ds.MeshConfig()), {}
  for name in names:
    state, metrics = step(CASES[name])
    norms = lambda m: {k: v for k, v in m.items() if k != 'block_norms'}
    out[name] = {
      'names': sorted(metrics) == sorted(want[1]),
      'loss': float(metrics['loss']),
      'right': float(metrics['right']),
      'metrics': gap(norms(metrics), norms(want[1])),
      'params': gap(state.params, want[0].params),
    }
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1:])
