"""Shapes that drive the tests and the benchmark of sparse_mla."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: B rows, T queries, S cached tokens, H heads, K chosen."""

  batch: int
  queries: int
  keys: int
  heads: int
  top_k: int
  nothing: float = 0.0  # share of the choices that are none


TEST = {
  'one_key': Shape(1, 1, 1, 2, 1),
  'plain': Shape(2, 5, 17, 3, 6),
  'some_none': Shape(1, 7, 12, 2, 9, nothing=0.4),
  'all_none': Shape(1, 2, 4, 2, 3, nothing=1.0),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'plain': Shape(2, 3, 90, 64, 70, nothing=0.2),
  'few_heads': Shape(1, 2, 20, 16, 5),
  'one_key': Shape(1, 1, 1, 16, 1),
  'all_none': Shape(1, 2, 8, 16, 3, nothing=1.0),
  # More blocks and more heads than are in flight at once.
  'refilled': Shape(1, 1, 200, 80, 190, nothing=0.1),
}

# DeepSeek-V3.2: 128 heads, 2048 of the tokens.
BENCH = {
  'prefill_s4096': Shape(1, 4096, 4096, 128, 2048),
  'decode_b64_s2_kv32768': Shape(64, 2, 32768, 128, 2048),
}
