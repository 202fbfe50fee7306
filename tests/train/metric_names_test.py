"""Metrics of a step: no two have one name."""

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.train import step
from tests.rl.sft_run_test import TINY


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
