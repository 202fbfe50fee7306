"""Reads MXFP4 weights as V4's checkpoints store routed experts.

A weight [R C] is C / 2 bytes a row, two E2M1 numbers in each, the first in the
low four bits; 32 neighbours of a row share one scale, a power of two (E8M0).
"""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.hf import safetensors_io
from deepseek_jax.hf.safetensors_io import Entry

PACKED = np.dtype('i1')
BLOCK = (1, 32)
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def unpacked_shape(shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the shape of the numbers [... C] of bytes [... C / 2]."""
  return (*shape[:-1], 2 * shape[-1])


def unpack(packed: np.ndarray) -> np.ndarray:
  """Returns E2M1 numbers [R C] float32 of bytes [R C / 2], not scaled."""
  byte = packed.view(np.uint8)
  code = np.stack([byte & 15, byte >> 4], axis=-1)
  value = np.where(code & 8, -GRID[code & 7], GRID[code & 7])
  return value.reshape(unpacked_shape(packed.shape))


def read(entry: Entry, rows: slice, columns: slice) -> np.ndarray:
  """Returns a region of numbers of a packed tensor; reads no other bytes."""
  # An odd column starts in the upper half of its byte.
  first = columns.start // 2
  held = slice(first, -(-columns.stop // 2))
  packed = safetensors_io.read(entry, rows.start, rows.stop, held)
  at = columns.start - 2 * first
  return unpack(packed)[:, at : at + columns.stop - columns.start]
