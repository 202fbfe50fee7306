"""Shapes that drive the tests and the benchmark of swiglu_quantize."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: M rows, F columns of the result, limit, kind of scale."""

  rows: int
  columns: int
  limit: float | None
  power_of_two: bool


TEST = {
  'plain': Shape(70, 128, None, False),
  'limit_ue8m0': Shape(64, 256, 1.0, True),
  'one_row': Shape(1, 128, None, True),
}

BENCH = {
  # Rows that 4096 tokens of V3 send to 32 of 256 experts, filled up.
  'v3_m36864_f2048': Shape(36864, 2048, None, True),
  'v4_m36864_f3072': Shape(36864, 3072, 10.0, True),
}
