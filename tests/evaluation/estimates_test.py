"""pass@k against enumeration, intervals against all resamples there are."""

import itertools

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

import deepseek_jax as ds
from deepseek_jax.evaluation import estimates


class PassAtKTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5, 7)
  def test_it_is_the_share_of_subsets_with_a_right_one(self, n):
    for right in range(n + 1):
      answers = [i < right for i in range(n)]
      for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        want = sum(map(any, subsets)) / len(subsets)
        got = estimates.pass_at_k(n, right, k)
        self.assertAlmostEqual(got, want, delta=1e-15, msg=f'{n} {right} {k}')

  def test_it_is_unbiased(self):
    # Over draws of n answers, each right with p: 1 - (1 - p)^k exactly.
    n, k, p = 6, 3, 0.3
    mean = sum(
      estimates.pass_at_k(n, sum(draw), k)
      * np.prod([p if one else 1 - p for one in draw])
      for draw in itertools.product((False, True), repeat=n)
    )
    self.assertAlmostEqual(mean, 1 - (1 - p) ** k, delta=1e-12)

  def test_large_counts_are_exact(self):
    self.assertEqual(estimates.pass_at_k(5000, 4999, 2), 1.0)
    got = estimates.pass_at_k(10_000, 1, 5_000)
    self.assertAlmostEqual(got, 0.5, delta=1e-15)

  @parameterized.parameters((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0))
  def test_what_can_not_be_is_refused(self, n, right, k):
    with self.assertRaisesRegex(ds.InputError, 'must lie in'):
      estimates.pass_at_k(n, right, k)


class BootstrapTest(parameterized.TestCase):
  def test_it_is_the_spread_of_all_resamples(self):
    values = [0.0, 0.1, 0.35, 0.4, 1.0]
    every = [np.mean(r) for r in itertools.product(values, repeat=5)]
    want = np.percentile(every, [2.5, 97.5])
    got = estimates.bootstrap(values, resamples=40_000)
    np.testing.assert_allclose(got, want, atol=0.01)

  def test_the_seed_decides(self):
    values = list(np.random.default_rng(0).random(50))
    first = estimates.bootstrap(values, seed=3)
    self.assertEqual(first, estimates.bootstrap(values, seed=3))
    self.assertNotEqual(first, estimates.bootstrap(values, seed=4))
    self.assertLess(first[0], np.mean(values))
    self.assertGreater(first[1], np.mean(values))

  def test_it_draws_problems_not_answers(self):
    # 200 problems of one answer, or 2 of which each has a hundred alike.
    many = estimates.bootstrap([0.0, 1.0] * 100)
    few = estimates.bootstrap([0.0, 1.0])
    self.assertLess(many[1] - many[0], 0.2)
    self.assertEqual(few, (0.0, 1.0))

  def test_large_ones_are_drawn_in_parts(self):
    values = np.arange(1 << 20) % 2
    low, high = estimates.bootstrap(values, resamples=9)
    self.assertLess(low, high)
    np.testing.assert_allclose([low, high], 0.5, atol=0.01)

  @parameterized.parameters(
    ([], {}), ([0.0, 1.0], {'resamples': 0}), ([0.0, 1.0], {'share': 1.0})
  )
  def test_what_can_not_be_is_refused(self, values, fields):
    with self.assertRaisesRegex(ds.InputError, 'bootstrap: '):
      estimates.bootstrap(values, **fields)


class EstimateTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 1), (0.0, 64), (1.0, 20), (1.0, 1000))
  def test_of_equal_values_it_is_the_exact_binomial_interval(self, value, N):
    made = estimates.estimate([value] * N)
    exact = stats.binomtest(int(value) * N, N).proportion_ci(0.95)
    self.assertEqual(made['value'], value)
    np.testing.assert_allclose(made['interval'], [*exact], rtol=1e-9)

  def test_equal_values_between_are_no_point(self):
    low, high = estimates.estimate([0.25] * 16)['interval']
    self.assertLess(low, 0.25)
    self.assertGreater(high, 0.25)
    # Ever surer, and never outside of 0..1.
    more = estimates.estimate([0.25] * 160)['interval']
    self.assertLess(more[1] - more[0], high - low)
    self.assertLessEqual(estimates.estimate([0.99])['interval'][1], 1.0)

  def test_of_others_it_is_the_bootstrap(self):
    values = [0.0, 0.5, 1.0, 1.0]
    made = estimates.estimate(values, resamples=100, seed=2)
    want = estimates.bootstrap(values, resamples=100, seed=2)
    self.assertEqual(made, {'value': 0.625, 'interval': [*want]})


if __name__ == '__main__':
  absltest.main()
