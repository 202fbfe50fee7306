"""Shapes that drive the tests and the benchmark of sinkhorn."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: N tokens, n streams, iterations."""

  tokens: int
  streams: int
  iterations: int


# The kernel takes these too, so the interpreter runs them.
TEST = {
  'v4': Shape(130, 4, 20),
  'one_token': Shape(1, 4, 3),
  'one_iteration': Shape(5, 4, 1),
  'two_streams': Shape(7, 2, 4),
}

BENCH = {'v4_t8192': Shape(8192, 4, 20), 'v4_decode_b128': Shape(128, 4, 20)}
