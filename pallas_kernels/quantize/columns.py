"""Block-scaled float8 of a transposed matrix on Hopper, in one pass.

A tile of 128 x 128 comes by TMA and is read from shared memory transposed
(ldmatrix), so that what was a column is a row with a scale of its own, and the
tile leaves by TMA as it is. Float8 becomes wider in shared memory first.
Legend: N rows, D columns of the matrix; both are multiples of 128.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize import gpu, reference
from pallas_kernels.warpgroups import wide

SIDE, HALF = gpu.SIDE, 64
_HALVES = pl.ds(0, HALF), pl.ds(HALF, HALF)  # registers hold one
_TILE = plgpu.Layout.WGMMA
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four numbers a thread, not two


def columns(
  x: jax.Array,
  scales: jax.Array | None,
  rows: int,
  power_of_two: bool,
  floor: float,
  dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Returns x.T in float8 [D N], and scales [D N/128].

  Args:
    x: [N D] bfloat16, float32, or float8 with scales [N D/128].
    scales: of float8, or None.
    rows: that a scale covers, 128.
    power_of_two, floor: as in quantize.
    dtype: what float8 times its scales is rounded to before.

  Raises:
    NotImplementedError: what the kernel can't take.
  """
  N, D = x.shape
  if rows != SIDE:
    raise NotImplementedError(f'{rows} rows a scale, not {SIDE}')
  if N % SIDE or D % SIDE:
    raise NotImplementedError(f'[{N}, {D}] is not of whole {SIDE} x {SIDE}')
  if scales is None:
    gpu.check_dtype(x)
  elif x.dtype != reference.FP8 or scales.dtype != jnp.float32:
    raise NotImplementedError(f'dtype {x.dtype} with scales {scales.dtype}')
  if compat.BEFORE_0_11:
    # It finds no layout for a tile that is read transposed.
    x = x if scales is None else reference.dequantize(x, scales, dtype)
    return gpu.quantize(x.T, (1, SIDE), power_of_two, floor)
  scratch = {
    'tile': _memory(x.dtype),
    'small': plgpu.SMEM((SIDE, SIDE), reference.FP8),
    'scale': plgpu.SMEM((SIDE,), jnp.float32),
    'here': plgpu.Barrier(),
  }
  if scales is not None:
    # By column block, so that a tile's scales are one piece.
    scales = scales.T
    scratch['wider'] = _memory(dtype)
  q, out_scales = compat.kernel(
    functools.partial(_body, power_of_two=power_of_two, floor=floor),
    (
      jax.ShapeDtypeStruct((D, N), reference.FP8),
      jax.ShapeDtypeStruct((N // SIDE, D), jnp.float32),
    ),
    grid={'row': N // SIDE, 'column': D // SIDE},
    scratch=scratch,
  )(x, scales)
  return q, out_scales.T


def _memory(dtype: jax.typing.DTypeLike) -> pl.MemoryRef:
  """Returns shared memory of a tile; swizzled where it is read transposed.

  Else 8 rows at a time would come from the same banks.
  """
  size = jnp.dtype(dtype).itemsize
  swizzled = (
    plgpu.TilingTransform((8, 128 // size)),
    plgpu.SwizzleTransform(128),
  )
  return plgpu.SMEM(
    (SIDE, SIDE), dtype, transforms=swizzled if size > 1 else ()
  )


def _body(
  x: jax.Ref, scales: jax.Ref | None, q: jax.Ref, out_scales: jax.Ref,
  tile: jax.Ref, small: jax.Ref, scale: jax.Ref, here: jax.Ref,
  wider: jax.Ref | None = None, *, power_of_two: bool, floor: float,
) -> None:  # fmt: skip
  """Quantises and transposes one tile."""
  row, column = lax.axis_index('row'), lax.axis_index('column')
  rows, columns = pl.ds(row * SIDE, SIDE), pl.ds(column * SIDE, SIDE)
  # Load: the tile as it lies; float8 becomes wider where it can be turned.
  plgpu.copy_gmem_to_smem(x.at[rows, columns], tile, here)
  plgpu.barrier_wait(here)
  if scales is not None:
    _widen(tile, scales.at[column, rows], wider)
    tile = wider
  # Quantise: a row of the transposed tile has one scale.
  for own in _HALVES:
    turned = compat.transposed(tile.at[:, own])
    at = slice(None), slice(None)
    values = compat.load(turned, at, _TILE, optimized=False)
    values = values.astype(jnp.float32)
    small[own], scale[own] = gpu.by_row(values, power_of_two, floor)
  # Store: the transposed tile, and the scales of its rows as one piece.
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(small, q.at[columns, rows])
  plgpu.copy_smem_to_gmem(scale, out_scales.at[row, columns])
  plgpu.wait_smem_to_gmem(0)


def _widen(tile: jax.Ref, scales: jax.Ref, wider: jax.Ref) -> None:
  """Writes float8 times the scales [128] of its rows, as dequantize rounds."""
  for own in _HALVES:
    factor = compat.load(scales, own, _BYTES.reduce(1), optimized=False)
    values = compat.load(tile, own, _BYTES)
    # float16 holds every float8 number, and converts in one instruction.
    values = values.astype(jnp.float16).astype(jnp.float32)
    values = values * wide(factor, values.shape)
    wider[own] = values.astype(wider.dtype)
  plgpu.commit_smem()
