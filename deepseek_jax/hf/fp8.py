"""Converts block-quantised float8 weights, the format of V3 and R1.

A weight [R C] is float8 e4m3 with one scale per 128 x 128 block
(`weight_scale_inv`, which multiplies); the last blocks may be ragged. With
'ue8m0' the scales are powers of two (V3.1), rounded up.
"""

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from deepseek_jax.errors import InputError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
BLOCK = (128, 128)


def scale_shape(
  shape: Sequence[int], block: Sequence[int] = BLOCK
) -> tuple[int, int]:
  """Returns the shape of the scales of a weight of `shape` [R C]."""
  return tuple(-(-n // b) for n, b in zip(shape, block))


def _spread(
  scale: np.ndarray,
  shape: Sequence[int],
  block: Sequence[int],
  start: Sequence[int] = (0, 0),
) -> np.ndarray:
  """Returns one scale per number, `shape`, its corner at `start`.

  Args:
    scale: [blocks of rows, blocks of columns].
    shape: of the numbers.
    block: rows and columns of a block.
    start: row and column of the corner in the whole weight.
  """
  rows, columns = (
    (first + np.arange(n)) // b - first // b
    for first, n, b in zip(start, shape, block)
  )
  return scale[rows][:, columns]


def dequantize(
  weight: np.ndarray,
  scale: np.ndarray,
  block: Sequence[int] = BLOCK,
  start: Sequence[int] = (0, 0),
) -> np.ndarray:
  """Returns e4m3 [R C] times its scales, float32 [R C].

  `weight` may be a part whose corner lies at (row, column) `start`; `scale`
  then begins with the block that holds the corner.
  """
  scale = scale.astype(np.float32)
  return weight.astype(np.float32) * _spread(scale, weight.shape, block, start)


def _block_max(weight: np.ndarray, block: Sequence[int]) -> np.ndarray:
  """Returns the largest magnitude of every block, [blocks, blocks] float32."""
  R, C = weight.shape
  rows, columns = scale_shape(weight.shape, block)
  padded = np.zeros((rows * block[0], columns * block[1]), np.float32)
  padded[:R, :C] = np.abs(weight)
  return padded.reshape(rows, block[0], columns, block[1]).max(axis=(1, 3))


def quantize(
  weight: np.ndarray,
  *,
  ue8m0: bool = False,
  block: Sequence[int] = BLOCK,
  name: str = 'weight',
) -> tuple[np.ndarray, np.ndarray]:
  """Quantises [R C] with each block's maximum at 448.

  Returns:
    e4m3 [R C] and float32 scales per block; powers of two with `ue8m0`.

  Raises:
    InputError: a number is not finite; names the weight.
  """
  weight = weight.astype(np.float32)
  top = _block_max(weight, block)
  if not np.isfinite(top).all():
    raise InputError(f'{name}: holds a number that is not finite')
  scale = np.where(top > 0, top / E4M3_MAX, 1.0).astype(np.float32)
  if ue8m0:
    scale = _power_of_two_above(scale)
  scale = np.maximum(scale, np.float32(2.0**-126))
  # The division may round one above the maximum, which would become NaN.
  scaled = weight / _spread(scale, weight.shape, block)
  return np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3), scale


def _power_of_two_above(scale: np.ndarray) -> np.ndarray:
  """Returns the least powers of two that are not below the scales."""
  mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2^exponent
  exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
  return np.ldexp(np.float32(1), exponent)


def rows_per_step(
  row_multiple: int, columns: int, limit: int, block: Sequence[int] = BLOCK
) -> int:
  """Returns rows to quantise at once: whole blocks, about `limit` numbers."""
  step = math.lcm(row_multiple, block[0])
  return step * max(1, limit // (step * columns))
