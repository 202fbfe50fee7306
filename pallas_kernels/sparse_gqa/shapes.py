"""Shapes that drive the tests and the benchmark of sparse_gqa."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case, by the letters of sparse_gqa.

  Attributes:
    batch, queries, tokens, groups, heads: B, T, S, G and J.
    chosen: M.
    nothing: share of the choices that are none.
    keys, values: K and V.
  """

  batch: int
  queries: int
  tokens: int
  groups: int
  heads: int
  chosen: int
  nothing: float = 0.0
  keys: int = 192
  values: int = 128


TEST = {
  'plain': Shape(2, 3, 9, 2, 3, 5, 0.3, 6, 4),
  'one_of_all': Shape(1, 1, 1, 1, 1, 1, 0, 4, 4),
  'all_none': Shape(1, 2, 4, 2, 2, 3, 1.0, 4, 6),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'nsa': Shape(1, 2, 90, 2, 4, 70, 0.2),
  'no_rope': Shape(2, 1, 20, 1, 16, 9, 0.2, 96, 64),
  'wide': Shape(1, 1, 70, 1, 70, 66, 0.1, 256, 256),
}

# NSA's 64 heads in 4 groups: 16 selected blocks of 64 tokens, or its window.
BENCH = {
  'nsa_selected_s8192': Shape(1, 8192, 8192, 4, 16, 1024),
  'nsa_window_s8192': Shape(1, 8192, 8192, 4, 16, 512),
  'nsa_decode_b64': Shape(64, 1, 8192, 4, 16, 1024),
}
