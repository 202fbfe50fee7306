"""Shapes that drive the tests and the benchmark of quantize."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: N rows, D columns, block of one scale, kind of scale."""

  rows: int
  columns: int
  block: tuple[int, int]
  power_of_two: bool


# The kernel takes these too, so the interpreter runs them.
TEST = {
  'rows': Shape(70, 256, (1, 128), False),
  'rows_ue8m0': Shape(64, 128, (1, 128), True),
  'one_row': Shape(1, 128, (1, 128), False),
  'squares': Shape(128, 256, (128, 128), False),
  'squares_ue8m0': Shape(256, 128, (128, 128), True),
}

BENCH = {
  'act_t8192_d7168': Shape(8192, 7168, (1, 128), False),
  'act_t8192_d7168_ue8m0': Shape(8192, 7168, (1, 128), True),
  'weight_7168_18432': Shape(7168, 18432, (128, 128), False),
}

# Transposed: a scale per 128 of the rows.
BENCH_COLUMNS = {
  'act_t8192_d7168': Shape(8192, 7168, (128, 1), True),
}
