"""Shapes that drive the tests and the benchmark of indexer."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: B rows, T queries, S keys, H heads, K chosen.

  The queries are the last of the keys.
  """

  batch: int
  queries: int
  keys: int
  heads: int
  top_k: int
  packed: bool = False  # several documents in a row
  far: bool = False  # keys in global memory, as for many of them
  shared: bool = False  # among thread blocks, as of few queries


TEST = {
  'one_key': Shape(1, 1, 1, 2, 3),
  'causal': Shape(2, 37, 37, 3, 8),
  'packed': Shape(1, 40, 40, 2, 5, packed=True),
  'decode': Shape(3, 2, 70, 4, 16),
  'all': Shape(1, 9, 9, 2, 9),
  'one_head': Shape(1, 20, 20, 1, 4),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'causal': Shape(1, 5, 130, 8, 20),
  'packed': Shape(2, 3, 70, 16, 6, packed=True),
  'far': Shape(1, 2, 4200, 8, 40, far=True),
  'shared': Shape(1, 3, 2300, 8, 40, shared=True),
  'shared_packed': Shape(2, 1, 2300, 8, 40, packed=True, shared=True),
}

BENCH = {
  's8192_h64': Shape(1, 8192, 8192, 64, 2048),
  'decode_b64_s2_kv65536': Shape(64, 2, 65536, 64, 2048),
  'decode_b1_kv131072': Shape(1, 1, 131072, 64, 2048),
  'chunk_t2048_kv32768': Shape(1, 2048, 32768, 64, 2048),
}
