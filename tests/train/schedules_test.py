"""Schedules against the published numbers."""

import math

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.train import schedules
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)

V3_TOKENS = 14.8e12


def rate(cfg, step, tokens, total=V3_TOKENS):
  return float(schedules.learning_rate(cfg, step, tokens, total))


class LearningRateTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.0, 2.2e-4),
    (9.99e12, 2.2e-4),
    (10e12, 2.2e-4),
    (11e12, 2.2e-5 + 0.5 * 1.98e-4 * (1 + math.cos(math.pi / 4.3))),
    (12.15e12, 1.21e-4),
    (14e12, 2.2e-5 + 0.5 * 1.98e-4 * (1 + math.cos(math.pi * 4 / 4.3))),
    (14.3e12, 2.2e-5),
    (14.5e12, 2.2e-5),
    (14.632e12, 2.2e-5),
    (14.634e12, 7.3e-6),
    (14.8e12, 7.3e-6),
  )
  def test_v3_after_that_many_tokens(self, tokens, want):
    got = rate(ScheduleConfig(), 10**6, tokens)
    # float32 holds 7 digits of the token count.
    self.assertAlmostEqual(got / want, 1, delta=2e-6)

  def test_v3_phases_are_333_and_167_billion_tokens(self):
    at = lambda t: rate(ScheduleConfig(), 10**6, t)
    grid = np.arange(14.3e12, V3_TOKENS, 1e9)
    values = np.array([at(t) for t in grid])
    self.assertAlmostEqual(np.isclose(values, 2.2e-5).sum(), 333, delta=1)
    self.assertAlmostEqual(np.isclose(values, 7.3e-6).sum(), 167, delta=1)

  @parameterized.parameters((0, 1 / 2000), (999, 0.5), (1999, 1), (2000, 1))
  def test_warm_up_is_linear_in_steps(self, step, share):
    got = rate(ScheduleConfig(), step, step * 1e6)
    self.assertAlmostEqual(got / 2.2e-4, share, delta=1e-6)

  @parameterized.parameters((0, 1.0), (59, 1.0), (61, 0.316), (91, 0.316**2))
  def test_v2_drops_twice(self, percent, want):
    cfg = ScheduleConfig('v2', peak=2.4e-4, warmup=2000)
    got = rate(cfg, 10**5, percent / 100 * 8.1e12, 8.1e12)
    self.assertAlmostEqual(got / 2.4e-4, want, delta=1e-6)

  def test_v2_lite_drops_at_80_and_90_percent(self):
    cfg = ScheduleConfig('v2', peak=4.2e-4, borders=(0.8, 0.9))
    for percent, want in ((79, 1.0), (80.01, 0.316), (90.01, 0.316**2)):
      got = rate(cfg, 10**5, percent / 100 * 5.7e12, 5.7e12)
      self.assertAlmostEqual(got / 4.2e-4, want, delta=1e-6)

  @parameterized.parameters(
    ('cosine', 0.0, 1.0),
    ('cosine', 0.5, 0.6),
    ('cosine', 0.25, 0.2 + 0.4 * (1 + math.cos(math.pi / 4))),
    ('cosine', 1.0, 0.2),
    ('wsd', 0.3, 1.0),
    ('wsd', 0.6, 1.0),
    ('wsd', 0.8, 0.6),
    ('wsd', 1.0, 0.2),
    ('constant', 0.9, 1.0),
  )
  def test_other_shapes(self, kind, share, want):
    cfg = ScheduleConfig(kind, peak=1e-3, warmup=0, end=0.2)
    self.assertAlmostEqual(rate(cfg, 0, share, 1.0), want * 1e-3, delta=1e-9)

  def test_a_run_past_its_end_keeps_the_last_rate(self):
    for kind in ('cosine', 'wsd'):
      cfg = ScheduleConfig(kind, peak=1.0, warmup=0)
      self.assertAlmostEqual(rate(cfg, 0, 1.2, 1.0), 0.1, places=6)

  @parameterized.parameters(
    ({'kind': 'wsd', 'borders': ()}, r'borders = \(\): wsd needs'),
    ({'kind': 'wsd', 'borders': (1.0,)}, r'borders = \(1\.0,\): wsd'),
    ({'kind': 'v2', 'borders': (60, 90)}, r'borders = \(60, 90\): v2'),
    ({'kind': 'v2', 'borders': (0.9, 0.6)}, 'in rising order'),
    ({'kind': 'v2', 'borders': (0.6, np.nan)}, 'borders = '),
    ({'kind': 'cosine', 'end': np.nan}, 'end = nan: must be finite'),
  )
  def test_shapes_that_no_run_has_are_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      ScheduleConfig(**fields)

  @parameterized.parameters(
    ({'peak': 0.0}, r'peak = 0\.0: must be above 0'),
    ({'warmup': -1}, 'warmup = -1: must be at least 0'),
  )
  def test_nonsense_is_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      ScheduleConfig(**fields)


class SwitchTest(parameterized.TestCase):
  @parameterized.parameters((9.999e12, 0.3), (10.001e12, 0.1), (0.0, 0.3))
  def test_mtp_weight_falls_after_10_trillion(self, tokens, want):
    got = schedules.v3_mtp_weight().at(tokens, V3_TOKENS)
    self.assertAlmostEqual(float(got), want, places=6)

  @parameterized.parameters((14.299e12, 0.001), (14.301e12, 0.0))
  def test_biases_freeze_for_the_last_500_billion(self, tokens, want):
    got = schedules.v3_bias_rate().at(tokens, V3_TOKENS)
    self.assertAlmostEqual(float(got), want, places=9)

  def test_the_value_changes_at_its_border(self):
    switch = SwitchConfig(2.0, 5.0, 0.5)
    self.assertEqual(float(switch.at(49.0, 100.0)), 2.0)
    self.assertEqual(float(switch.at(50.0, 100.0)), 5.0)

  @parameterized.parameters(0, 1, 2)
  def test_values_that_are_no_number_are_refused(self, which):
    values = [1.0, 1.0, 1.0]
    values[which] = np.nan
    with self.assertRaisesRegex(ds.InputError, 'nan.*must be finite'):
      SwitchConfig(*values)


class BatchTest(parameterized.TestCase):
  def test_v3_ramp_goes_from_3072_to_15360_over_469_billion(self):
    ramp = BatchConfig(15360, 3072, 469e9, increment=512)
    self.assertEqual(ramp.at(0), 3072)
    self.assertEqual(ramp.at(469e9), 15360)
    self.assertEqual(ramp.at(14e12), 15360)
    # Half way: 3072 + 6144, a multiple of the increment above the start.
    self.assertEqual(ramp.at(int(234.5e9)), 3072 + 6144)
    sizes = [ramp.at(t) for t in np.linspace(0, 469e9, 500)]
    self.assertEqual(sizes, sorted(sizes))
    self.assertEqual({(s - 3072) % 512 for s in sizes}, {0})

  def test_a_step_up_comes_only_once_its_tokens_are_seen(self):
    ramp = BatchConfig(8, 2, 60.0, increment=2)
    sizes = [ramp.at(t) for t in (0, 19, 20, 39, 40, 59, 60, 61)]
    self.assertEqual(sizes, [2, 2, 4, 4, 6, 6, 8, 8])

  def test_without_a_ramp_the_size_is_constant(self):
    self.assertEqual({BatchConfig(8).at(t) for t in (0, 10, 10**12)}, {8})

  @parameterized.parameters(
    ({'size': 0}, 'size = 0'),
    ({'size': 8, 'accumulate': 3}, 'accumulate = 3: must divide size = 8,'),
    (
      {'size': 8, 'start': 2, 'ramp_tokens': 9.0, 'accumulate': 4},
      'accumulate = 4: must divide start = 2,',
    ),
    ({'size': 8, 'ramp_tokens': np.nan}, 'ramp_tokens = nan: must be fin'),
    ({'size': 8, 'ramp_tokens': 9.0}, r'start = 0: must lie in 1\.\.8'),
    ({'size': 8, 'start': 9, 'ramp_tokens': 9.0}, 'start = 9: must lie'),
  )
  def test_sizes_that_do_not_fit_are_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      BatchConfig(**fields)


if __name__ == '__main__':
  absltest.main()
