"""Steps that are compiled once for all runs of one recipe."""

import types

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.run import steps
from deepseek_jax.train import step
from tests.rl.sft_run_test import TINY


class SharedTest(absltest.TestCase):
  def config(self, **changes):
    made = ds.RunConfig(
      TINY,
      ds.DataConfig(path='a', tokenizer='bytes', vocab_size=261, seq_len=24),
      ds.TrainConfig(1000, ds.BatchConfig(4)),
    )
    return ds.changed(made, changes)

  def test_runs_that_differ_in_no_step_share_it(self):
    of = lambda config: steps._shared(ds.build(config.model), config)
    one = of(self.config())
    same = self.config(**{'seed': 3, 'data.path': 'b', 'init_from': 'c'})
    self.assertIs(of(same), one)
    for changes in (
      {'train.tokens': 2000},
      {'train.optimizer.decay': 0.0},
      {'model.dim': 32},
      {'objective': ds.GRPOConfig()},
      {'mesh.data': 2},
    ):
      with self.subTest(str(changes)):
        self.assertIsNot(of(self.config(**changes)), one)

  def test_what_has_no_hash_is_not_shared(self):
    config = self.config()
    own = types.SimpleNamespace(train=[], objective=(), mesh=config.mesh)
    of = lambda: steps._shared(ds.build(config.model), own)
    self.assertIsNot(of(), of())


class NamesTest(parameterized.TestCase):
  @parameterized.parameters(
    ds.PretrainingConfig(), ds.SFTConfig(), ds.GRPOConfig(kl='k3', kl_weight=1)
  )
  def test_no_metric_of_an_objective_hides_another(self, objective):
    found = step.metrics_of(objective.build(ds.build(TINY)))
    self.assertEqual(found['entropy'].per, 'layer')  # of the routers

  def test_one_that_would_is_named(self):
    made = ds.PretrainingConfig().build(None)
    made = made._replace(metrics={'load': ds.Metric('Own')})
    with self.assertRaisesRegex(
      ds.InputError, "its metric 'load' has the name"
    ):
      step.metrics_of(made)


if __name__ == '__main__':
  absltest.main()
