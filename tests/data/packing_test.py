"""Best-fit packing: nothing lost, nothing split, few rows."""

import time

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.data import packing
from deepseek_jax.errors import InputError


class PackingTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2, 3)
  def test_all_are_there_once_and_rows_are_not_too_long(self, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, 300).tolist()
    rows = packing.best_fit(lengths, 64)
    self.assertEqual(sorted(n for row in rows for n in row), list(range(300)))
    self.assertLessEqual(max(sum(lengths[n] for n in r) for r in rows), 64)
    # Best fit decreasing needs at most 11/9 of the fewest rows, plus 4.
    self.assertLessEqual(len(rows), 11 / 9 * -(-sum(lengths) // 64) + 4)

  def test_each_goes_into_the_fullest_row_that_takes_it(self):
    self.assertEqual(packing.best_fit([3, 1], 4), [[0, 1]])
    # 6 | 5 after it; 3 fits both, and leaves less in the row of 6.
    self.assertEqual(packing.best_fit([3, 6, 5], 9), [[0, 1], [2]])
    self.assertEqual(packing.best_fit([], 9), [])

  def test_many_take_little_time(self):
    lengths = np.random.default_rng(0).integers(1, 4097, 50_000).tolist()
    start = time.perf_counter()
    packing.best_fit(lengths, 4096)
    self.assertLess(time.perf_counter() - start, 5)  # 0.3 s alone

  @parameterized.parameters(([0],), ([5, 10],))
  def test_what_fits_no_row_is_refused(self, lengths):
    with self.assertRaisesRegex(InputError, 'must have 1 to 9'):
      packing.best_fit(lengths, 9)

  def test_rows_hold_what_was_packed(self):
    rng = np.random.default_rng(0)
    sequences = [
      {
        'tokens': rng.integers(1, 9, n).astype(np.int32),
        'old': rng.normal(size=n).astype(np.float32),
        'routes': rng.integers(0, 9, (n, 2, 3)).astype(np.int32),
      }
      for n in (3, 5, 2, 7)
    ]
    rows = packing.best_fit([3, 5, 2, 7], 8)
    out = packing.laid_out(sequences, rows, 8, pad=99)
    found = 0
    for row, numbers in enumerate(rows):
      for segment, number in enumerate(numbers, start=1):
        inside = out['segments'][row] == segment
        for name, array in sequences[number].items():
          np.testing.assert_array_equal(out[name][row][inside], array)
        want = np.arange(len(sequences[number]['tokens']))
        np.testing.assert_array_equal(out['positions'][row][inside], want)
        found += inside.sum()
    self.assertEqual((out['segments'] > 0).sum(), found)
    self.assertTrue((out['tokens'][out['segments'] == 0] == 99).all())

  def test_those_of_the_rows_suffice(self):
    sequences = [{'tokens': np.full(n, n, np.int32)} for n in (3, 4, 5)]
    held = {1: sequences[1], 2: sequences[2]}
    for rows in ([[2], [1]], [[], [1]], [[2, 1], []]):
      out, whole = (packing.laid_out(s, rows, 9) for s in (held, sequences))
      for name, array in whole.items():
        np.testing.assert_array_equal(out[name], array)
    padding = packing.laid_out(sequences, [[], []], 9, pad=7)
    self.assertTrue((padding['tokens'] == 7).all())


if __name__ == '__main__':
  absltest.main()
