"""Shapes that drive the tests and the benchmark of collapse_norm."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: N tokens, n streams, D width."""

  tokens: int
  streams: int
  dim: int


TEST = {
  'four': Shape(5, 4, 1024),
  'two_wide': Shape(3, 2, 2048),
  'one_token': Shape(1, 4, 1024),
}

BENCH = {'v4_t8192': Shape(8192, 4, 7168)}
