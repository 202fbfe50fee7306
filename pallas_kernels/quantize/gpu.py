"""Block-scaled float8 on Hopper: one tile in, its maximum, one tile out."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize import reference
from pallas_kernels.warpgroups import wide

ROWS, SIDE = 64, 128
_TILE = plgpu.Layout.WGMMA
_STRIDED = plgpu.Layout.WG_STRIDED((SIDE, SIDE), vec_size=8)


def check_dtype(x: jax.Array) -> None:
  """Raises NotImplementedError unless x is bfloat16 or float32."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'dtype {x.dtype}, not bfloat16 or float32')


def by_row(
  values: jax.Array, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns values [R 128] in float8 and their scales [R]."""
  amax = jnp.abs(values).max(axis=1)
  own, gain = reference.scales_of(amax, power_of_two, floor)
  gain = wide(gain, values.shape)
  return (values * gain).astype(reference.FP8), own


def quantize(
  x: jax.Array, block: tuple[int, int], power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns q [N D] and scales for blocks of (1, 128) or (128, 128)."""
  check_dtype(x)
  if block == (1, SIDE):
    return _rows(x, power_of_two, floor)
  if block == (SIDE, SIDE):
    return _squares(x, power_of_two, floor)
  raise NotImplementedError(f'blocks of {block}, not (1, 128) or (128, 128)')


def _rows(
  x: jax.Array, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Quantises with a scale per 1 x 128; pads N to 64 * n."""
  N, D = x.shape
  whole = -(-N // ROWS) * ROWS
  padded = x if whole == N else jnp.pad(x, ((0, whole - N), (0, 0)))
  q, scales = compat.kernel(
    functools.partial(_rows_body, power_of_two=power_of_two, floor=floor),
    (
      jax.ShapeDtypeStruct((whole, D), reference.FP8),
      # By column block first, so that a tile's scales are one piece.
      jax.ShapeDtypeStruct((D // SIDE, whole), jnp.float32),
    ),
    grid={'row': whole // ROWS, 'column': D // SIDE},
    scratch={
      'tile': plgpu.SMEM((ROWS, SIDE), x.dtype),
      'small': plgpu.SMEM((ROWS, SIDE), reference.FP8),
      'scale': plgpu.SMEM((ROWS,), jnp.float32),
      'here': plgpu.Barrier(),
    },
  )(padded)
  return q[:N], scales[:, :N].T


def _rows_body(
  x: jax.Ref, q: jax.Ref, scales: jax.Ref, tile: jax.Ref, small: jax.Ref,
  scale: jax.Ref, here: jax.Ref, *, power_of_two: bool, floor: float,
) -> None:  # fmt: skip
  """Quantises 64 rows of 128 columns."""
  row, column = lax.axis_index('row'), lax.axis_index('column')
  rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * SIDE, SIDE)
  # Load: each row of the tile is one block, with one scale.
  plgpu.copy_gmem_to_smem(x.at[rows, columns], tile, here)
  plgpu.barrier_wait(here)
  values = compat.load(tile, slice(None), _TILE).astype(jnp.float32)
  small[...], scale[...] = by_row(values, power_of_two, floor)
  # Store: the tile's numbers, and its scales as one piece.
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(small, q.at[rows, columns])
  plgpu.copy_smem_to_gmem(scale, scales.at[column, rows])
  plgpu.wait_smem_to_gmem(0)


def _squares(
  x: jax.Array, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Quantises with a scale per 128 x 128."""
  N, D = x.shape
  return compat.kernel(
    functools.partial(_squares_body, power_of_two=power_of_two, floor=floor),
    (
      jax.ShapeDtypeStruct((N, D), reference.FP8),
      jax.ShapeDtypeStruct((N // SIDE, D // SIDE), jnp.float32),
    ),
    grid={'row': N // SIDE, 'column': D // SIDE},
    scratch={
      'tile': plgpu.SMEM((SIDE, SIDE), x.dtype),
      'small': plgpu.SMEM((SIDE, SIDE), reference.FP8),
      'here': plgpu.Barrier(),
    },
  )(x)


def _squares_body(
  x: jax.Ref,
  q: jax.Ref,
  scales: jax.Ref,
  tile: jax.Ref,
  small: jax.Ref,
  here: jax.Ref,
  *,
  power_of_two: bool,
  floor: float,
) -> None:
  """Quantises one block of 128 x 128."""
  row, column = lax.axis_index('row'), lax.axis_index('column')
  where = (pl.ds(row * SIDE, SIDE), pl.ds(column * SIDE, SIDE))
  # Load: the tile is one block, so its maximum crosses all warps.
  plgpu.copy_gmem_to_smem(x.at[where], tile, here)
  plgpu.barrier_wait(here)
  values = compat.load(tile, slice(None), _STRIDED).astype(jnp.float32)
  own, gain = reference.scales_of(jnp.abs(values).max(), power_of_two, floor)
  small[...] = (values * gain).astype(small.dtype)
  scales[row, column] = own
  # Store: one scale, straight from registers.
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(small, q.at[where])
  plgpu.wait_smem_to_gmem(0)
