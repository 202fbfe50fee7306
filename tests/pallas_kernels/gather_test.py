"""Where each thread of a warpgroup puts the rows that it gathers."""

import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import gather


def swizzled(address):
  """64-byte swizzle: bits 4 and 5 of an address, exchanged by bits 7 and 8."""
  return address ^ ((address >> 7 & 3) << 4)


def physical(row, column, columns):
  """Byte of a number in tiles of 8 rows by 32, one row of tiles at a time."""
  tile = row // 8 * (columns // 32) + column // 32
  return swizzled(2 * (tile * 256 + row % 8 * 32 + column % 32))


class GatherTest(parameterized.TestCase):
  @parameterized.parameters(
    (32, 32), (32, 64), (64, 128), (32, 256), (64, 256), (64, 512)
  )
  def test_every_piece_is_copied_once_to_where_wgmma_reads_it(
    self, rows, columns
  ):
    copied = np.zeros((rows, columns), int)
    for thread in range(128):
      for row, copies in gather.places(thread, rows, columns):
        for column, (i, j), inside in copies:
          start = 2 * ((i * (columns // 32) + j) * 256 + inside)
          self.assertEqual(start, physical(row, column, columns))
          copied[row, column : column + 8] += 1
    np.testing.assert_array_equal(copied, 1)

  def test_threads_of_a_warp_fetch_whole_lines_and_hit_every_bank(self):
    for top in range(0, 128, 32):
      warp = [
        next(gather.places(thread, 64, 256)) for thread in range(top, top + 32)
      ]
      lines = {(row, copies[0][0] // 64) for row, copies in warp}
      self.assertLen(lines, 4)  # rows of 128 bytes
      starts = [
        2 * ((i * 8 + j) * 256 + inside)
        for _, copies in warp
        for _, (i, j), inside in copies[:1]
      ]
      banks = np.bincount([start % 128 // 16 for start in starts])
      np.testing.assert_array_equal(banks, 4)


if __name__ == '__main__':
  absltest.main()
