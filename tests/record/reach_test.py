"""Compute to a loss, against NumPy, known curves and simulated seeds."""

import math

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from deepseek_jax.errors import InputError
from deepseek_jax.record import reach
from deepseek_jax.record.reach import Point

BUDGETS = (3e11, 9e11, 2.7e12)


def curve(flops, factor=1.0, bend=0.012, slope=-0.16):
  """Returns the loss of an arm that is worth `factor` times its compute."""
  x = math.log(flops * factor / 9e11)
  return math.exp(0.9 + slope * x + bend * x * x)


def noisy(rng, factors, deviation, seeds=2):
  """Returns points of arms: all budgets with seed 0, the first with others."""
  out = []
  for arm, factor in factors.items():
    for seed in range(seeds):
      for flops in BUDGETS if seed == 0 else BUDGETS[:1]:
        spread = math.exp(rng.normal(0, deviation)) if deviation else 1.0
        out.append(Point(arm, flops, curve(flops, factor) * spread, seed))
  return out


def by_numpy(points, arm, first):
  """Returns (ratio, low, high) from normal equations and differences."""
  arms = sorted({p.arm for p in points})
  seeds = sorted({p.seed for p in points})
  x = np.log([p.flops for p in points])

  def row(name, at, seed):
    return np.array(
      [float(name == a) for a in arms]
      + [at * (name == a) for a in arms]
      + [at**2]
      + [float(seed == s) for s in seeds[1:]]
    )

  design = np.stack([row(p.arm, a, p.seed) for p, a in zip(points, x)])
  y = np.log([p.loss for p in points])
  inverse = np.linalg.pinv(design.T @ design)
  values = inverse @ design.T @ y
  freedom = len(points) - design.shape[1]
  variance = np.sum((y - design @ values) ** 2) / freedom
  end = max(a for p, a in zip(points, x) if p.arm == first)

  def distance(v):
    """Returns ln of the compute ratio, by polynomial roots."""
    n = len(arms)
    i = arms.index(arm)
    goal = row(first, end, seeds[0]) @ v
    roots = np.roots([v[2 * n], v[n + i], v[i] - goal])
    real = [r.real for r in roots if abs(r.imag) < 1e-9]
    falls = [r for r in real if v[n + i] + 2 * v[2 * n] * r < 0]
    return falls[0] - end

  moves = np.zeros(len(values))
  for i, value in enumerate(values):
    step = 1e-5 * max(abs(value), 1e-3)
    up, down = values.copy(), values.copy()
    up[i], down[i] = value + step, value - step
    moves[i] = (distance(up) - distance(down)) / (2 * step)
  half = stats.t.ppf(0.975, freedom) * math.sqrt(
    variance * moves @ inverse @ moves
  )
  middle = distance(values)
  return np.exp([middle, middle - half, middle + half])


class ReachTest(parameterized.TestCase):
  def test_equals_numpy(self):
    rng = np.random.default_rng(0)
    points = noisy(rng, {'gqa': 1.0, 'moe': 2.0, 'slow': 0.6}, 0.01)
    found = reach.fit(points)
    for arm in ('moe', 'slow'):
      got = reach.reach(found, arm, 'gqa')
      want = by_numpy(points, arm, 'gqa')
      np.testing.assert_allclose(got[:3], want, rtol=1e-4)

  @parameterized.parameters(0.5, 0.9, 1.7, 4.0)
  def test_an_arm_worth_so_much_compute_needs_as_much_less(self, factor):
    points = noisy(None, {'gqa': 1.0, 'new': factor}, 0.0)
    got = reach.reach(reach.fit(points), 'new', 'gqa')
    np.testing.assert_allclose(got[:3], 1 / factor, rtol=1e-5)
    self.assertEqual(got.measured, factor >= 1)

  def test_an_interval_holds_the_truth_in_95_of_100_cases(self):
    rng = np.random.default_rng(1)
    arms = {'gqa': 1.0, 'a': 1.6, 'b': 1.2, 'c': 2.2}
    held = total = 0
    for _ in range(300):
      found = reach.fit(noisy(rng, arms, 0.004))
      for arm in ('a', 'b', 'c'):
        got = reach.reach(found, arm, 'gqa')
        held += got.low <= 1 / arms[arm] <= got.high
        total += 1
    self.assertBetween(held / total, 0.92, 0.98)

  def test_what_a_seed_does_to_all_arms_is_no_scatter(self):
    rng = np.random.default_rng(2)
    points = noisy(rng, {'gqa': 1.0, 'new': 1.5}, 0.003)
    moved = [p._replace(loss=p.loss * (1.3 if p.seed else 1)) for p in points]
    one, other = reach.fit(points), reach.fit(moved)
    self.assertAlmostEqual(one.scatter, other.scatter, places=12)
    np.testing.assert_allclose(
      reach.reach(one, 'new', 'gqa')[:3],
      reach.reach(other, 'new', 'gqa')[:3],
      rtol=1e-9,
    )

  def test_two_budgets_make_straight_lines(self):
    rng = np.random.default_rng(3)
    points = noisy(rng, {'gqa': 1, 'new': 2}, 0.01, seeds=3)
    points = [p for p in points if p.flops < BUDGETS[-1]]
    found = reach.fit(points)
    self.assertFalse(found.bent)
    self.assertLess(reach.reach(found, 'new', 'gqa').ratio, 1)

  def test_the_first_arm_is_its_own_measure(self):
    found = reach.fit(noisy(np.random.default_rng(4), {'gqa': 1, 'a': 2}, 0.01))
    self.assertEqual(reach.reach(found, 'gqa', 'gqa'), (1, 1, 1, True))

  def test_an_arm_that_never_gets_there_has_none(self):
    points = noisy(None, {'gqa': 1.0}, 0.0)
    # It falls, and turns long before the loss of the other.
    points += [p._replace(arm='flat', loss=3.2 * p.loss**0.01) for p in points]
    self.assertIsNone(reach.reach(reach.fit(points), 'flat', 'gqa'))

  @parameterized.parameters(
    ([Point('a', 1e9, math.nan), Point('a', 2e9, 1.0)], 'finite'),
    ([Point('a', 0.0, 2.0), Point('a', 2e9, 1.0)], 'above 0'),
    ([Point('a', 1e9, 2.0), Point('a', 1e9, 2.1, 1)], 'a: a curve needs two'),
    ([Point('a', 1e9, 2.0), Point('a', 2e9, 1.0)], 'leave no variance'),
    ([], 'there are none'),
  )
  def test_points_that_make_no_curve_are_named(self, points, words):
    with self.assertRaisesRegex(InputError, words):
      reach.fit(points)

  def test_an_unknown_arm_is_named(self):
    found = reach.fit(noisy(np.random.default_rng(5), {'gqa': 1, 'a': 2}, 0.01))
    with self.assertRaisesRegex(
      InputError, "arm = 'mla': must be one of gqa, a"
    ):
      reach.reach(found, 'mla', 'gqa')


if __name__ == '__main__':
  absltest.main()
