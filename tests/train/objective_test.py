"""A loss is an argument: a user's own trains everywhere, and metrics say so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.run import step_record
from deepseek_jax.train import step as train
from tests import fake_devices, tiny
from tests.train.objective_worker import CASES, LabelSmoothing, T, config


@functools.cache
def one_step(objective):
  model = tiny.model('step')
  cfg = config(ds.MeshConfig()).train
  state = train.initial_state(model, cfg, tiny.variables('step'))
  run = jax.jit(train.train_step(model, cfg, objective))
  return jax.device_get(run(state, tiny.documents(4, T + 1, 0, 3))[1])


@dataclasses.dataclass(frozen=True)
class Weighted:
  """Next-token prediction whose weights are all multiplied."""

  by: float

  def build(self, model):
    plain = ds.PretrainingConfig().build(model)

    def inputs(batch):
      read = ds.next_token(batch)
      return read._replace(weights=read.weights * self.by)

    return plain._replace(inputs=inputs)


class OwnObjectiveTest(absltest.TestCase):
  def test_weights_of_any_size_give_one_loss_and_gradient(self):
    want, got = one_step(ds.PretrainingConfig()), one_step(Weighted(2.0**-20))
    for name in ('loss', 'grad_norm'):
      np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)

  def test_it_trains_on_one_device_a_mesh_and_through_a_pipeline(self):
    for name, found in fake_devices.run(
      'tests.train.objective_worker', *CASES, devices=2
    ).items():
      with self.subTest(name):
        self.assertTrue(found['names'])
        self.assertLess(found['metrics'], 1e-5)
        self.assertLess(found['params'], 1e-5)
        self.assertNotAlmostEqual(found['loss'], found['right'], places=3)

  def test_its_loss_is_that_of_numpy(self):
    model, variables = tiny.model('step'), tiny.variables('step')
    batch = tiny.documents(4, T + 1, 0, 3)
    inputs = ds.next_token(batch)
    out = jax.jit(model.apply)(
      variables,
      inputs.tokens,
      positions=inputs.positions,
      segment_ids=inputs.segments,
    )
    logits = np.float64(out.logits)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    right = np.take_along_axis(log_p, inputs.labels[..., None], -1)[..., 0]
    weights = np.float64(inputs.weights)
    want = -((0.8 * right + 0.2 * log_p.mean(-1)) * weights).sum()
    got = one_step(LabelSmoothing(0.2))
    np.testing.assert_allclose(got['loss'], want / weights.sum(), rtol=1e-5)

  def test_a_metric_that_is_no_scalar_is_refused(self):
    @dataclasses.dataclass(frozen=True)
    class Wrong:
      def build(self, model):
        return ds.Objective(lambda p, i, s: (jnp.float32(0), {'all': i.labels}))

    with self.assertRaisesRegex(ds.InputError, 'objective: all has the shape'):
      one_step(Wrong())

  def test_a_run_stores_its_kind(self):
    made = config(ds.MeshConfig())
    stored = ds.to_dict(made)['objective']
    name = f'{LabelSmoothing.__module__}:LabelSmoothing'
    self.assertEqual(stored, {'kind': name, 'amount': 0.2})
    self.assertEqual(ds.from_dict(ds.RunConfig, ds.to_dict(made)), made)
    plain = ds.changed(made, {'objective': ds.PretrainingConfig()})
    self.assertEqual(ds.to_dict(plain)['objective'], {'kind': 'pretraining'})
    self.assertEqual(ds.from_dict(ds.RunConfig, ds.to_dict(plain)), plain)
    with self.assertRaisesRegex(ds.InputError, "objective.kind = 'ppo'"):
      changed = {**ds.to_dict(plain), 'objective': {'kind': 'ppo'}}
      ds.from_dict(ds.RunConfig, changed)


class MetricsTest(absltest.TestCase):
  def test_every_metric_of_a_step_is_described(self):
    for objective in (ds.PretrainingConfig(), LabelSmoothing(0.2)):
      known = train.metrics_of(objective.build(None))
      found = one_step(objective)
      self.assertEqual(set(found) - set(known), set())
      for name, value in found.items():
        scalar = not isinstance(value, dict) and np.ndim(value) == 0
        self.assertEqual(scalar, known[name].per == '', name)

  def test_every_scalar_is_recorded(self):
    found = one_step(ds.PretrainingConfig())
    written = step_record.scalars_of(found)
    for name in ('applied', 'streak', 'update_norm', 'mtp_loss', 'skipped'):
      self.assertIn(name, written)
    self.assertEqual(
      set(written),
      {k for k, v in found.items() if not isinstance(v, dict) and not v.ndim},
    )


if __name__ == '__main__':
  absltest.main()
