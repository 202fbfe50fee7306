"""Shapes that drive the tests and the benchmark of compress."""

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
  """Sizes a case.

  Attributes:
    documents: of each row, how many tokens each has, one after the other;
      what is left of the longest row is padding.
    ratio: m, tokens of a window.
    series: J.
    dim: C.
  """

  documents: tuple[tuple[int, ...], ...]
  ratio: int
  series: int
  dim: int


TEST = {
  # Documents shorter than a window, as long as one, and with a tail.
  'overlapping': Shape(((9, 3, 4, 12), (5, 8)), 4, 2, 512),
  'index_keys': Shape(((9, 3, 4), (13,)), 4, 2, 128),
  'long_windows': Shape(((70, 64), (100,)), 64, 1, 128),
  'odd': Shape(((7, 2, 10),), 3, 2, 384),
  'prime_and_wide': Shape(((80, 5),), 37, 1, 256),
  'long_and_overlapping': Shape(((90,),), 20, 2, 128),
  'no_entry': Shape(((3, 2),), 4, 2, 128),
}

BENCH = {
  'csa_t8192': Shape(((8192,),), 4, 2, 512),
  'csa_keys_t8192': Shape(((8192,),), 4, 2, 128),
  'hca_t8192': Shape(((8192,),), 128, 1, 512),
}


def places(shape: Shape) -> tuple[np.ndarray, ...]:
  """Returns `at` of all whole windows and, for J = 2, `before`: [B S] int32.

  The last entry of each row is none.
  """
  m, rows = shape.ratio, []
  for lengths in shape.documents:
    row, start = [], 0
    for length in lengths:
      ends = [start + m * (n + 1) - 1 for n in range(length // m)]
      row += zip(ends, [-1, *ends])
      start += length
    rows.append(row)
  S = max(map(len, rows)) + 1
  padded = [row + [(-1, -1)] * (S - len(row)) for row in rows]
  at, before = np.moveaxis(np.asarray(padded, np.int32), -1, 0)
  return (at, before) if shape.series == 2 else (at,)
