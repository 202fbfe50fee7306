"""Checks what tests measure with: an error that is NaN is no small one."""

import itertools

import numpy as np
from absl.testing import absltest

from tests import tiny


class LargestTest(absltest.TestCase):
  def test_nan_is_the_largest_wherever_it_stands(self):
    for values in itertools.permutations((0.5, np.nan, 0.1)):
      self.assertTrue(np.isnan(tiny.largest(iter(values))), values)
    self.assertEqual(tiny.largest([0.1, 0.5, -3]), 0.5)
    self.assertEqual(tiny.largest([0.1, np.inf]), np.inf)

  def test_so_is_an_array_with_one(self):
    self.assertTrue(np.isnan(tiny.relative([1.0, np.nan], [1.0, 2.0])))


if __name__ == '__main__':
  absltest.main()
