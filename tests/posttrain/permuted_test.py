"""Rewards dealt out at random: the control of reinforcement."""

import tempfile
from pathlib import Path

import jax
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.run import sources
from tests.run import rl_run_test

# Every answer to a prompt has one reward: groups differ, answers do not.
OWN = (
  'def score(text, problem):\n  return float(int(problem["prompt"][1:]) % 2)'
)


class PermutedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    rl_run_test.task(self.folder)
    Path(self.folder, 'own.py').write_text(OWN)

  def round(self, permuted):
    made = rl_run_test.config(
      self.folder, **{'rollouts.permuted': permuted, 'rollouts.prompts': 8}
    )
    made = ds.changed(made, {'train.batch.size': 32})
    store = sources.opened(made, lambda line: None)
    batches = sources.batches(store, made)
    variables = ds.build(made.model).init(jax.random.key(0))
    batches.see(lambda: variables)
    return batches.next(32), dict(batches.told)

  def test_they_are_dealt_over_all_groups(self):
    (plain, told), (dealt, other) = self.round(False), self.round(True)
    # The answers and the sum of rewards stay; whose they are does not.
    np.testing.assert_array_equal(plain['tokens'], dealt['tokens'])
    self.assertAlmostEqual(told['reward'], other['reward'])
    self.assertBetween(told['reward'], 0.1, 0.9)
    self.assertEqual(told['equal_groups'], 1.0)
    self.assertLess(other['equal_groups'], 0.5)
    self.assertEqual(np.abs(plain['advantages']).max(), 0)
    self.assertGreater(np.abs(dealt['advantages']).max(), 0)

  def test_a_round_that_is_drawn_again_is_dealt_again(self):
    one, other = self.round(True)[0], self.round(True)[0]
    np.testing.assert_array_equal(one['advantages'], other['advantages'])


if __name__ == '__main__':
  absltest.main()
