"""Advantages: deviations, and rewards that are equal or missing."""

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.rl.advantages import (
  AdvantageConfig,
  LengthPenaltyConfig,
  advantages,
)


def values(rewards, **fields):
  return advantages(rewards, AdvantageConfig(**fields)).values


class AdvantagesTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'eps': 1e-4}, 0.5 / (0.57735026919 + 1e-4)),
    ({'eps': 0.0, 'std': 'population'}, 1.0),
    ({'scale': 'none'}, 0.5),
  )
  def test_of_each_convention(self, fields, want):
    found = values([[1.0, 0, 0, 1]], **fields)
    np.testing.assert_allclose(found, [[want, -want, -want, want]], rtol=1e-9)

  @parameterized.product(
    scale=('none', 'group', 'batch'), reward=(0.1, 1.0, -7.3, 1e-30)
  )
  def test_equal_rewards_give_exactly_nothing(self, scale, reward):
    rewards = np.full((2, 3), reward)
    rewards[1] = [0, 1, 2]
    made = advantages(rewards, AdvantageConfig(scale=scale, eps=0.0))
    np.testing.assert_array_equal(made.values[0], 0)
    np.testing.assert_array_equal(made.varied, [False, True])

  def test_the_batch_scales_by_the_deviation_of_all(self):
    rewards = np.array([[0.0, 1], [4, 6]])
    want = np.array([[-0.5, 0.5], [-1, 1]]) / rewards.std(ddof=1)
    found = values(rewards, scale='batch', eps=0.0)
    np.testing.assert_allclose(found, want)

  def test_a_missing_reward_enters_no_mean(self):
    made = advantages(
      [[1.0, np.nan, 0, np.inf], [np.nan, np.nan, np.nan, 3.0]],
      AdvantageConfig(eps=0.0),
    )
    want = np.array([[1.0, 0, -1, 0], [0, 0, 0, 0]]) / np.sqrt(2)
    np.testing.assert_allclose(made.values, want)
    np.testing.assert_array_equal(
      made.scored, [[True, False, True, False], [False, False, False, True]]
    )
    np.testing.assert_array_equal(made.varied, [True, False])

  def test_one_missing_reward_of_two_leaves_the_other(self):
    rewards = np.array([[[1.0, np.nan], [0, 1], [0, 0]]])
    np.testing.assert_allclose(
      values(rewards, scale='none'), [[1 / 3, 1 / 3, -2 / 3]]
    )

  def test_each_reward_by_itself_weighs_alike(self):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(3, 4, 2)) * [1.0, 1e6]
    found = values(rewards, several='each', eps=0.0)
    parts = sum(values(rewards[..., r], eps=0.0) for r in range(2))
    want = parts / parts.std(ddof=1)
    np.testing.assert_allclose(found, want, atol=1e-12)
    self.assertGreater(np.abs(found - values(rewards, eps=0.0)).max(), 0.1)

  def test_a_scale_of_the_rewards_changes_nothing(self):
    rewards = np.random.default_rng(1).normal(size=(4, 8))
    want = values(rewards, eps=0.0)
    for by in (1e-20, 1e-300, 1e300):
      found = values(rewards * by, eps=0.0)
      np.testing.assert_allclose(found, want, rtol=1e-9)

  @parameterized.parameters(([[1.0], [0.0]],), ([1.0, 0.0],), (3.0,))
  def test_a_group_of_one_is_refused(self, rewards):
    with self.assertRaisesRegex(InputError, 'at least 2 answers'):
      values(rewards)


class LengthPenaltyTest(absltest.TestCase):
  def test_it_grows_over_the_last_tokens(self):
    penalty = LengthPenaltyConfig(most=20, soft=4)
    found = penalty(np.array([0, 16, 17, 18, 20, 25]))
    np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -1, -1])

  def test_a_soft_part_beyond_the_whole_is_refused(self):
    with self.assertRaisesRegex(InputError, r'soft = 9: must be at most'):
      LengthPenaltyConfig(most=8, soft=9)


if __name__ == '__main__':
  absltest.main()
