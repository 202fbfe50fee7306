"""Routing records are exact, bounded, resumable and readable as a table."""

import math
import tempfile
import unittest.mock
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.record import flight, load_balance, routing

_REDUCE = {
  'load': 'sum',
  'bias': 'last',
  'entropy': 'mean',
  'peak': 'max',
  'dropped': 'sum',
}
_L, _E = 3, 4


def _arrays(step):
  rng = np.random.default_rng(step)
  return {
    'load': rng.integers(0, 100, (_L, _E), np.int32),
    'bias': rng.normal(size=(_L, _E)).astype(np.float32),
    'entropy': rng.random(_L, np.float32),
    'peak': rng.random(_L),
    'dropped': np.float32(rng.random()),
  }


def _record(path, steps, resume_step=None, capacity=8):
  recorder = routing.FlightRecorder(
    path, _REDUCE, capacity=capacity, resume_step=resume_step
  )
  for step in steps:
    recorder.record(step, **_arrays(step))
  recorder.save()
  return recorder


class FlightTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = Path(folder.name) / 'run' / 'routing.npz'

  @parameterized.parameters(1, 7, 8, 9, 16, 17, 40, 100)
  def test_intervals_equal_a_direct_reduction(self, steps):
    _record(self.path, range(1, steps + 1))
    got = flight.load(self.path)
    self.assertLessEqual(len(got.last), 8)
    self.assertEqual(got.records.sum(), steps)
    np.testing.assert_array_equal(got.first[1:], got.last[:-1] + 1)
    self.assertEqual((got.first[0], got.last[-1]), (1, steps))
    for n, (first, last) in enumerate(zip(got.first, got.last)):
      rows = [_arrays(step) for step in range(first, last + 1)]
      stacked = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
      want = {
        'load': stacked['load'].sum(0),
        'bias': stacked['bias'][-1],
        'entropy': stacked['entropy'].astype(np.float64).mean(0),
        'peak': stacked['peak'].max(0),
        'dropped': stacked['dropped'].astype(np.float64).sum(0),
      }
      for name, value in want.items():
        # 1e-12: float64 sums in another order; counts and states are exact.
        np.testing.assert_allclose(got.arrays[name][n], value, 1e-12, 0, name)

  def test_all_intervals_but_the_last_are_equally_long(self):
    _record(self.path, range(1, 108))
    records = flight.load(self.path).records
    self.assertEqual(set(records[:-1]), {16})
    self.assertLessEqual(records[-1], 16)

  def test_counts_stay_exact_beyond_single_precision(self):
    recorder = routing.FlightRecorder(self.path, {'load': 'sum'}, capacity=2)
    for step in range(8):
      recorder.record(step, load=np.array([[2**24 + 1, 1]], np.int32))
    recorder.save()
    total = flight.load(self.path).arrays['load'].sum(0)
    np.testing.assert_array_equal(total, [[8 * (2**24 + 1), 8]])

  def test_size_is_bounded_whatever_the_length(self):
    sizes = []
    for steps in (64, 1000):
      self.path.unlink(missing_ok=True)
      _record(self.path, range(steps), capacity=64)
      sizes.append(self.path.stat().st_size)
    raw = 64 * (_L * _E * (8 + 4) + _L * 16 + 8 + 24)
    self.assertLess(max(sizes), raw + 4096)

  @parameterized.parameters(1, 5, 8, 13, 16, 20, 33)
  def test_resumed_run_equals_straight_run(self, restored):
    straight = self.path.with_name('straight.npz')
    _record(straight, range(1, 41))
    _record(self.path, range(1, restored + 1))
    _record(self.path, range(restored + 1, 41), resume_step=restored)
    self.assertEqual(self.path.read_bytes(), straight.read_bytes())

  def test_intervals_beyond_the_restored_step_are_dropped(self):
    _record(self.path, range(1, 17))  # 8 intervals of 2 steps
    recorder = _record(self.path, [10, 11], resume_step=9)
    got = flight.load(self.path)
    np.testing.assert_array_equal(got.last, [2, 4, 6, 8, 11])
    np.testing.assert_array_equal(got.first, [1, 3, 5, 7, 10])
    with self.assertRaisesRegex(InputError, 'step=11 .* resume_step=10'):
      recorder.record(11, **_arrays(11))
    _record(self.path, [1], resume_step=-1)
    np.testing.assert_array_equal(flight.load(self.path).last, [1])

  @parameterized.parameters('os.fsync', 'pathlib.Path.replace')
  def test_a_crash_while_saving_leaves_the_old_file(self, call):
    recorder = _record(self.path, [1, 2])
    before = self.path.read_bytes()
    recorder.record(3, **_arrays(3))
    crash = unittest.mock.patch(call, side_effect=OSError)
    with crash, self.assertRaises(OSError):
      recorder.save()
    self.assertEqual(self.path.read_bytes(), before)

  def test_table_has_a_row_per_interval_layer_and_expert(self):
    recorder = routing.FlightRecorder(
      self.path, _REDUCE | {'pairs': 'sum'}, layers=(1, 2, 5)
    )
    pairs = np.zeros((_L, _E, _E), np.int32)
    for step in (1, 2):
      recorder.record(step, **_arrays(step), pairs=pairs)
    recorder.save()
    table = flight.table(self.path)
    self.assertNotIn('pairs', table)
    self.assertEqual({len(c) for c in table.values()}, {2 * _L * _E})
    row = (
      (table['last_step'] == 2) & (table['layer'] == 5) & (table['expert'] == 3)
    )
    self.assertEqual(row.sum(), 1)
    want = _arrays(2)
    self.assertEqual(table['load'][row], want['load'][2, 3])
    self.assertEqual(table['bias'][row], want['bias'][2, 3])
    self.assertEqual(table['entropy'][row], want['entropy'][2])
    self.assertEqual(table['dropped'][row], want['dropped'])

  def test_large_arrays_have_longer_intervals_of_their_own(self):
    def record(steps, resume_step=None):
      recorder = routing.FlightRecorder(
        self.path,
        {'load': 'sum'},
        capacity=8,
        resume_step=resume_step,
        coarse={'together': 'sum'},
        coarse_capacity=2,
      )
      for step in steps:
        rng = np.random.default_rng(step)
        recorder.record(
          step,
          load=rng.integers(0, 9, (_L, _E)),
          together=rng.integers(0, 9, (_L, _E, _E)),
        )
      recorder.save()

    record(range(1, 14))
    got = flight.load(self.path)
    self.assertEqual(got.arrays.keys(), {'load'})
    self.assertLen(got.last, 7)
    coarse = got.coarse
    self.assertEqual(coarse.first.tolist(), [1, 9])
    self.assertEqual(coarse.last.tolist(), [8, 13])
    self.assertEqual(coarse.records.tolist(), [8, 5])
    for n, steps in enumerate((range(1, 9), range(9, 14))):
      want = 0
      for step in steps:
        rng = np.random.default_rng(step)
        rng.integers(0, 9, (_L, _E))
        want = want + rng.integers(0, 9, (_L, _E, _E))
      np.testing.assert_array_equal(coarse.arrays['together'][n], want)
    straight = self.path.read_bytes()

    columns = flight.pairs(self.path)
    self.assertLen(columns['together'], 2 * _L * _E * _E)
    row = (1 * _L + 2) * _E * _E + 3 * _E + 1
    found = {k: int(v[row]) for k, v in columns.items()}
    want = coarse.arrays['together'][1, 2, 3, 1]
    self.assertEqual(
      found,
      {
        'first_step': 9,
        'last_step': 13,
        'records': 5,
        'layer': 2,
        'group': 3,
        'other': 1,
        'together': want,
      },
    )

    record(range(1, 9), resume_step=-1)
    record(range(9, 14), resume_step=8)
    self.assertEqual(self.path.read_bytes(), straight)
    with self.assertRaisesRegex(InputError, 'coarse_reduce=.*together.*, not'):
      routing.FlightRecorder(
        self.path,
        {'load': 'sum'},
        capacity=8,
        coarse={'pairs': 'sum'},
        coarse_capacity=2,
      )

  def test_no_large_arrays_are_no_pairs(self):
    _record(self.path, range(1, 4))
    self.assertIsNone(flight.load(self.path).coarse)
    self.assertEqual(flight.pairs(self.path), {})

  def test_device_arrays_are_recorded(self):
    recorder = routing.FlightRecorder(
      self.path, {'load': 'sum', 'bias': 'last'}
    )
    bias = jnp.full((2, 3), 0.5, jnp.bfloat16)
    recorder.record(1, load=jnp.ones((2, 3), jnp.int32), bias=bias)
    recorder.save()
    got = flight.load(self.path).arrays
    np.testing.assert_array_equal(got['load'], np.ones((1, 2, 3)))
    np.testing.assert_array_equal(got['bias'], np.full((1, 2, 3), 0.5))

  def test_the_caller_may_reuse_a_buffer(self):
    recorder = routing.FlightRecorder(self.path, {'bias': 'last'})
    buffer = np.zeros((1, 2), np.float32)
    recorder.record(1, bias=buffer)
    buffer += 1
    recorder.record(2, bias=buffer)
    recorder.save()
    bias = flight.load(self.path).arrays['bias']
    np.testing.assert_array_equal(bias[:, 0, 0], [0, 1])

  def test_bad_input_is_named(self):
    new = routing.FlightRecorder
    with self.assertRaisesRegex(InputError, r"reduce\['x'\]='median'"):
      new(self.path, {'x': 'median'})
    with self.assertRaisesRegex(InputError, 'capacity=3'):
      new(self.path, {'x': 'sum'}, capacity=3)
    with self.assertRaisesRegex(InputError, 'name at least one'):
      new(self.path, {})
    with self.assertRaisesRegex(InputError, 'may not start with _'):
      new(self.path, {'_first': 'sum'})
    recorder = new(self.path, {'load': 'sum'}, layers=(1, 2))
    with self.assertRaisesRegex(InputError, r"arrays \['lod'\]: pass \['load'"):
      recorder.record(1, lod=np.zeros((2, 3)))
    with self.assertRaisesRegex(InputError, 'load has 3 layers'):
      recorder.record(1, load=np.zeros((3, 3)))
    recorder.record(1, load=np.zeros((2, 3)))
    with self.assertRaisesRegex(InputError, r'load has shape \(2, 4\)'):
      recorder.record(2, load=np.zeros((2, 4)))
    recorder.save()
    with self.assertRaisesRegex(InputError, 'was recorded with capacity=256'):
      new(self.path, {'load': 'sum'}, layers=(1, 2), capacity=8)


class BalanceTest(parameterized.TestCase):
  def test_max_violation_and_entropy_equal_their_definitions(self):
    load = np.random.default_rng(0).integers(0, 50, (5, 2, 7))
    load[0, 0, :3] = 0
    violation, entropy = (
      load_balance.max_violation(load),
      load_balance.load_entropy(load),
    )
    for i in np.ndindex(5, 2):
      counts = [int(n) for n in load[i]]
      mean = sum(counts) / 7
      want = (max(counts) - mean) / mean
      self.assertAlmostEqual(violation[i], want, delta=1e-12)
      shares = [n / sum(counts) for n in counts if n]
      want = -sum(p * math.log(p) for p in shares) / math.log(7)
      self.assertAlmostEqual(entropy[i], want, delta=1e-12)

  @parameterized.parameters(1, 3, 6, 64)
  def test_equal_loads_are_exact_balance(self, experts):
    load = np.full((2, experts), 7, np.int32)
    np.testing.assert_array_equal(load_balance.max_violation(load), 0)
    np.testing.assert_allclose(load_balance.load_entropy(load), 1, rtol=1e-14)

  def test_one_expert_for_all_is_the_extreme(self):
    load = np.array([0, 9, 0, 0])
    self.assertEqual(load_balance.max_violation(load), 3)
    self.assertEqual(load_balance.load_entropy(load), 0)

  def test_no_tokens_have_no_balance(self):
    load = np.array([[0, 0], [1, 1]])
    np.testing.assert_array_equal(load_balance.max_violation(load), [np.nan, 0])
    np.testing.assert_array_equal(load_balance.load_entropy(load), [np.nan, 1])


if __name__ == '__main__':
  absltest.main()
