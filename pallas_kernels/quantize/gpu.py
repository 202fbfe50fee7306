"""Block-scaled float8 on Hopper: one tile in, its maximum, one tile out."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize import reference

ROWS, SIDE = 64, 128
_TILE = plgpu.Layout.WGMMA
_STRIDED = plgpu.Layout.WG_STRIDED((SIDE, SIDE), vec_size=8)


def check_dtype(x):
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'dtype {x.dtype}, not bfloat16 or float32')


def by_row(values, power_of_two, floor):
  """values [R 128] float32 in registers -> float8 and scales [R]."""
  amax = jnp.abs(values).max(axis=1)
  own, gain = reference.scales_of(amax, power_of_two, floor)
  gain = lax.broadcast_in_dim(gain, values.shape, [0])
  return (values * gain).astype(reference.FP8), own


def quantize(x, block, power_of_two, floor):
  check_dtype(x)
  if block == (1, SIDE):
    return _rows(x, power_of_two, floor)
  if block == (SIDE, SIDE):
    return _squares(x, power_of_two, floor)
  raise NotImplementedError(f'blocks of {block}, not (1, 128) or (128, 128)')


def _rows(x, power_of_two, floor):
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


def _rows_body(x, q, scales, tile, small, scale, here, *, power_of_two, floor):
  row, column = lax.axis_index('row'), lax.axis_index('column')
  rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * SIDE, SIDE)
  plgpu.copy_gmem_to_smem(x.at[rows, columns], tile, here)
  plgpu.barrier_wait(here)
  values = compat.load(tile, slice(None), _TILE).astype(jnp.float32)
  small[...], scale[...] = by_row(values, power_of_two, floor)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(small, q.at[rows, columns])
  plgpu.copy_smem_to_gmem(scale, scales.at[column, rows])
  plgpu.wait_smem_to_gmem(0)


def _squares(x, power_of_two, floor):
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


def _squares_body(x, q, scales, tile, small, here, *, power_of_two, floor):
  row, column = lax.axis_index('row'), lax.axis_index('column')
  where = (pl.ds(row * SIDE, SIDE), pl.ds(column * SIDE, SIDE))
  plgpu.copy_gmem_to_smem(x.at[where], tile, here)
  plgpu.barrier_wait(here)
  values = compat.load(tile, slice(None), _STRIDED).astype(jnp.float32)
  own, gain = reference.scales_of(jnp.abs(values).max(), power_of_two, floor)
  small[...] = (values * gain).astype(small.dtype)
  scales[row, column] = own
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(small, q.at[where])
  plgpu.wait_smem_to_gmem(0)
