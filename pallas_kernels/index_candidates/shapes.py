"""Shapes that drive the tests and the benchmark of index_candidates."""

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
  """Sizes a case: B rows, T queries, S keys, H heads, K chosen.

  The queries are the last of the keys.

  Attributes:
    size: keys of a block; count: blocks of a query.
    origin: where the first document begins, whose blocks may lie anywhere.
  """

  batch: int
  queries: int
  keys: int
  heads: int
  size: int
  count: int
  top_k: int
  origin: int = 0


TEST = {
  'one_key': Shape(1, 1, 1, 2, 4, 2, 3),
  'plain': Shape(2, 17, 61, 3, 4, 3, 5),
  'anywhere': Shape(2, 40, 61, 2, 8, 3, 9, 3),
  'one_head': Shape(1, 20, 20, 1, 2, 4, 4),
  'all': Shape(1, 9, 30, 2, 16, 2, 32),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'tiles': Shape(2, 2, 400, 8, 64, 3, 70),
  'anywhere': Shape(1, 3, 333, 16, 128, 2, 40, 5),
  'small_blocks': Shape(1, 3, 150, 8, 16, 7, 30, 3),
  'few_keys': Shape(1, 2, 64, 64, 64, 2, 20, 30),
  'shared': Shape(1, 2, 900, 8, 64, 9, 100, 1),
  'many_heads': Shape(1, 1, 200, 64, 32, 5, 10),
}

# DeepSeek-V3.2's heads with the config's default blocks, and with smaller ones.
BENCH = {
  's65536_m128': Shape(1, 4096, 65536, 64, 128, 64, 2048),
  's65536_m64': Shape(1, 4096, 65536, 64, 64, 64, 2048),
  'decode_b64_kv65536': Shape(64, 1, 65536, 64, 128, 64, 2048),
}


def blocks(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Returns starts [B T N] and last [B T], int32, of a causal search.

  Blocks are counted from `origin`; a query has some of those before its own,
  drawn, and its own behind them.
  """
  rng = np.random.default_rng(seed)
  place = np.arange(shape.keys - shape.queries, shape.keys)
  place = np.broadcast_to(place, (shape.batch, shape.queries))
  number = np.maximum(place - shape.origin, 0) // shape.size
  starts = np.full((*place.shape, shape.count), -1, np.int32)
  for index in np.ndindex(*place.shape):
    own = number[index]
    others = min(own, shape.count - 1)
    drawn = np.sort(rng.choice(own, others, replace=False)) if own else []
    found = shape.origin + shape.size * np.append(drawn, own)
    starts[index][: len(found)] = found
  return starts, place.astype(np.int32) + 1
