"""The gate lets ordinary steps pass and keeps bad ones out of its memory."""

import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.train.gate import GateConfig, initial_gate, judge

CFG = GateConfig(warmup=20)


@functools.cache
def jitted(cfg):
  return jax.jit(functools.partial(judge, cfg))


def steady(cfg=CFG, steps=60, state=None):
  """The state after ordinary noisy steps, all of which must pass."""
  rng = np.random.default_rng(0)
  state = state or initial_gate()
  for i in range(steps):
    loss = 3 - 0.01 * i + 0.05 * rng.normal()
    ok, state = jitted(cfg)(state, loss, 1 + 0.1 * rng.normal())
    assert bool(ok), i
  return state


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class GateTest(parameterized.TestCase):
  @parameterized.parameters(
    (np.nan, 1.0),
    (3.0, np.nan),
    (np.inf, 1.0),
    (3.0, np.inf),
    (-np.inf, 1.0),
    (1e4 + 3, 1.0),
    (3.0, 1e4),
  )
  def test_a_bad_step_is_skipped_and_leaves_no_trace(self, loss, norm):
    before = steady()
    ok, after = jitted(CFG)(before, loss, norm)
    self.assertFalse(bool(ok))
    self.assertEqual(int(after.skipped), 1)
    self.assertEqual(int(after.streak), 1)
    same(after[:3], before[:3])  # means, deviations, accepted
    ok, again = jitted(CFG)(after, 2.4, 1.0)
    self.assertTrue(bool(ok))
    self.assertEqual((int(again.skipped), int(again.streak)), (1, 0))

  def test_the_judgement_has_no_scale(self):
    rng = np.random.default_rng(1)
    seen = 1 + 0.2 * rng.normal(size=(60, 2))
    seen[40], seen[50, 1] = 30, 9

    def judged(s):
      state, verdicts = initial_gate(), []
      for loss, norm in seen:
        ok, state = jitted(CFG)(state, np.float32(loss), np.float32(norm * s))
        verdicts.append(bool(ok))
      return verdicts

    want = judged(1.0)
    self.assertEqual([i for i, ok in enumerate(want) if not ok], [40, 50])
    for k in (-50, -20, 20, 50):
      self.assertEqual(judged(2.0**k), want, k)
    # Beyond, one that cannot be judged passes, and no state is lost.
    for s in (1e-30, 0.0):
      verdicts = judged(s)
      self.assertEqual([i for i, ok in enumerate(verdicts) if not ok], [40])

  def test_a_huge_norm_in_the_warm_up_does_not_end_the_run(self):
    ok, state = jitted(CFG)(initial_gate(), 3.0, 1e30)
    self.assertTrue(bool(ok))
    state = steady(state=state)
    self.assertTrue(np.isfinite(np.asarray(state.square)).all())

  def test_a_norm_of_zero_is_no_yardstick(self):
    # What is trained may have no gradient at first.
    state = initial_gate()
    for _ in range(30):
      _, state = jitted(CFG)(state, 3.0, 0.0)
    self.assertTrue(bool(jitted(CFG)(state, 3.0, 1.0)[0]))

  def test_the_streak_counts_skips_in_a_row(self):
    state, streaks = steady(), []
    for loss in (np.nan, 1e4, np.inf, 2.4, np.nan):
      _, state = jitted(CFG)(state, loss, 1.0)
      streaks.append(int(state.streak))
    self.assertEqual(streaks, [1, 2, 3, 0, 1])
    self.assertEqual(int(state.skipped), 4)
    self.assertEqual(int(state.accepted), 61)

  def test_many_bad_steps_never_become_the_norm(self):
    state = before = steady()
    for _ in range(100):
      ok, state = jitted(CFG)(state, 1e4, 1.0)
      self.assertFalse(bool(ok))
    same(state[:3], before[:3])
    self.assertTrue(bool(jitted(CFG)(state, 2.4, 1.0)[0]))

  def test_only_finiteness_is_judged_during_warm_up(self):
    ok, state = jitted(CFG)(initial_gate(), 1e4, 1e4)
    self.assertTrue(bool(ok))
    for seen in ((np.nan, 1.0), (1.0, np.nan), (1.0, np.inf)):
      ok, after = jitted(CFG)(state, *seen)
      self.assertFalse(bool(ok), seen)
      same(after[:3], state[:3])
    state = steady(steps=19)
    self.assertTrue(bool(jitted(CFG)(state, 100.0, 1.0)[0]))
    self.assertFalse(bool(jitted(CFG)(steady(steps=20), 100.0, 1.0)[0]))

  def test_sigma_0_judges_finiteness_alone(self):
    cfg = GateConfig(sigma=0.0, warmup=1)
    state = steady(cfg)
    self.assertTrue(bool(jitted(cfg)(state, 1e9, 1e9)[0]))
    self.assertFalse(bool(jitted(cfg)(state, np.nan, 1.0)[0]))
    self.assertFalse(bool(jitted(cfg)(state, 1.0, np.nan)[0]))

  def test_a_sudden_drop_is_no_explosion(self):
    self.assertTrue(bool(jitted(CFG)(steady(), 0.01, 0.001)[0]))

  def test_a_run_without_noise_goes_on(self):
    state = initial_gate()
    for _i in range(60):
      ok, state = jitted(CFG)(state, 3.0, 1.0)
      self.assertTrue(bool(ok))
    # A deviation of 0 would call every change an explosion.
    self.assertTrue(bool(jitted(CFG)(state, 3.2, 1.1)[0]))
    self.assertFalse(bool(jitted(CFG)(state, 4.0, 1.0)[0]))

  def test_statistics_equal_a_float64_loop(self):
    rng = np.random.default_rng(1)
    seen = rng.normal(size=(120, 2)) * [0.1, 0.2] + [3, 1]
    cfg = GateConfig(sigma=0.0, decay=0.9)
    mean, square, state = np.zeros(2), np.zeros(2), initial_gate()
    for i, (loss, norm) in enumerate(seen):
      _, state = jitted(cfg)(state, loss, norm)
      rate = max(0.1, 1 / (i + 1))
      new = mean + rate * (seen[i] - mean)
      square += rate * ((seen[i] - mean) * (seen[i] - new) - square)
      mean = new
      if i < 10:  # plain averages at first
        np.testing.assert_allclose(mean, seen[: i + 1].mean(axis=0))
        np.testing.assert_allclose(square, seen[: i + 1].var(axis=0))
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.square, square, rtol=1e-4)

  def test_no_two_leaves_share_a_buffer(self):
    leaves = jax.tree.leaves(initial_gate())
    where = {a.unsafe_buffer_pointer() for a in leaves}
    self.assertLen(where, len(leaves))

  @parameterized.parameters(
    ({'decay': 1.0},), ({'decay': 0.0},), ({'patience': 0},)
  )
  def test_nonsense_is_refused(self, fields):
    with self.assertRaisesRegex(ds.InputError, '(decay|patience) = .*: must '):
      GateConfig(**fields)


if __name__ == '__main__':
  absltest.main()
