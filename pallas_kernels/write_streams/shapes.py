"""Shapes that drive the tests and the benchmark of write_streams."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: N tokens, n streams, D width."""

  tokens: int
  streams: int
  dim: int


TEST = {
  'four': Shape(5, 4, 1024),
  'two': Shape(3, 2, 512),
  'one_token': Shape(1, 3, 1536),
}

BENCH = {'v4_t8192': Shape(8192, 4, 7168)}
