"""SwiGLU and its gradient in block-scaled float8 on Hopper.

A thread block holds 64 rows of the same 128 columns of gate and of up. They are
read once, and what leaves is in float8 with one scale a row.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize import gpu as quantize
from pallas_kernels.quantize.gpu import ROWS, SIDE
from pallas_kernels.quantize.reference import FP8

_TILE = plgpu.Layout.WGMMA


def forward(
  gate_up: jax.Array, limit: float | None, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns q [M F] and scales [M F/128]; pads M to 64 * n."""
  quantize.check_dtype(gate_up)
  M, F = gate_up.shape[0], gate_up.shape[1] // 2
  padded = _padded(gate_up)
  whole = padded.shape[0]
  q, scales = compat.kernel(
    functools.partial(
      _forward_body, limit=limit, power_of_two=power_of_two, floor=floor
    ),
    (
      jax.ShapeDtypeStruct((whole, F), FP8),
      # By column block first, so that a tile's scales are one piece.
      jax.ShapeDtypeStruct((F // SIDE, whole), jnp.float32),
    ),
    grid={'row': whole // ROWS, 'column': F // SIDE},
    scratch={
      'gate': plgpu.SMEM((ROWS, SIDE), gate_up.dtype),
      'up': plgpu.SMEM((ROWS, SIDE), gate_up.dtype),
      'small': plgpu.SMEM((ROWS, SIDE), FP8),
      'scale': plgpu.SMEM((ROWS,), jnp.float32),
      'here': plgpu.Barrier(num_arrivals=2),
    },
  )(padded)
  return q[:M], scales[:, :M].T


def _padded(x: jax.Array) -> jax.Array:
  """Returns x [M .] with zeros up to 64 * n rows."""
  more = -x.shape[0] % ROWS
  return jnp.pad(x, ((0, more), (0, 0))) if more else x


def _limited(
  gate: jax.Array, up: jax.Array, limit: float | None
) -> tuple[jax.Array, jax.Array]:
  """Returns what of gate and up is computed with."""
  if limit is None:
    return gate, up
  up = jnp.minimum(jnp.maximum(up, -limit), limit)
  return jnp.minimum(gate, limit), up


def _forward_body(
  gate_up: jax.Ref, q: jax.Ref, scales: jax.Ref, gate: jax.Ref, up: jax.Ref,
  small: jax.Ref, scale: jax.Ref, here: jax.Ref, *, limit: float | None,
  power_of_two: bool, floor: float,
) -> None:  # fmt: skip
  """Computes 64 rows of 128 columns."""
  row, column = lax.axis_index('row'), lax.axis_index('column')
  rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * SIDE, SIDE)
  # Load: gate's columns, and up's, which lie F further.
  _load(gate_up, rows, column, gate, up, here)
  plgpu.barrier_wait(here)
  read = lambda ref: compat.load(ref, slice(None), _TILE).astype(jnp.float32)
  g, u = _limited(read(gate), read(up), limit)
  # Activate and quantise, all in registers.
  values = g / (1.0 + jnp.exp(-g)) * u
  small[...], scale[...] = quantize.by_row(values, power_of_two, floor)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(small, q.at[rows, columns])
  plgpu.copy_smem_to_gmem(scale, scales.at[column, rows])
  plgpu.wait_smem_to_gmem(0)


def _load(
  gate_up: jax.Ref,
  rows: pl.Slice,
  column: jax.Array,
  gate: jax.Ref,
  up: jax.Ref,
  here: jax.Ref,
) -> None:
  """Begins to load the tiles of gate and up of a block of columns."""
  for half, ref in enumerate((gate, up)):
    left = half * (gate_up.shape[1] // 2) + column * SIDE
    plgpu.copy_gmem_to_smem(gate_up.at[rows, pl.ds(left, SIDE)], ref, here)


def gradient(
  gate_up: jax.Array, grad: jax.Array, limit: float | None, power_of_two: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the gradient [M 2F], and q and scales of it; pads M to 64 * n."""
  quantize.check_dtype(gate_up)
  M, width = gate_up.shape
  padded = _padded(gate_up)
  whole = padded.shape[0]
  tile = lambda dtype: plgpu.SMEM((ROWS, SIDE), dtype)
  found, q, scales = compat.kernel(
    functools.partial(_gradient_body, limit=limit, power_of_two=power_of_two),
    (
      jax.ShapeDtypeStruct((whole, width), gate_up.dtype),
      jax.ShapeDtypeStruct((whole, width), FP8),
      jax.ShapeDtypeStruct((width // SIDE, whole), jnp.float32),
    ),
    grid={'row': whole // ROWS, 'column': width // (2 * SIDE)},
    scratch={
      'gate': tile(gate_up.dtype),
      'up': tile(gate_up.dtype),
      'given': tile(gate_up.dtype),
      'out': plgpu.SMEM((2, ROWS, SIDE), gate_up.dtype),
      'small': plgpu.SMEM((2, ROWS, SIDE), FP8),
      'scale': plgpu.SMEM((2, ROWS), jnp.float32),
      'here': plgpu.Barrier(num_arrivals=3),
    },
  )(padded, _padded(grad))
  return found[:M], (q[:M], scales[:, :M].T)


def _gradient_body(
  gate_up: jax.Ref, grad: jax.Ref, found: jax.Ref, q: jax.Ref,
  scales: jax.Ref, gate: jax.Ref, up: jax.Ref, given: jax.Ref, out: jax.Ref,
  small: jax.Ref, scale: jax.Ref, here: jax.Ref, *, limit: float | None,
  power_of_two: bool,
) -> None:  # fmt: skip
  """Computes the gradients of 64 rows of 128 columns of gate and of up."""
  row, column = lax.axis_index('row'), lax.axis_index('column')
  rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * SIDE, SIDE)
  # Load: three tiles, once.
  _load(gate_up, rows, column, gate, up, here)
  plgpu.copy_gmem_to_smem(grad.at[rows, columns], given, here)
  plgpu.barrier_wait(here)
  read = lambda ref: compat.load(ref, slice(None), _TILE).astype(jnp.float32)

  def of_gate() -> jax.Array:
    g, u = _limited(read(gate), read(up), limit)
    share = 1.0 / (1.0 + jnp.exp(-g))
    slope = share * (1.0 + g * (1.0 - share))
    return read(given) * u * slope * _inside(read(gate), limit, None)

  def of_up() -> jax.Array:
    g = _limited(read(gate), read(gate), limit)[0]
    low = None if limit is None else -limit
    return (
      read(given) * (g / (1.0 + jnp.exp(-g))) * _inside(read(up), limit, low)
    )

  # One half after the other: registers hold no more than that.
  for half, compute in enumerate((of_gate, of_up)):
    values = compute().astype(gate_up.dtype)
    out[half] = values
    small[half], scale[half] = quantize.by_row(
      values.astype(jnp.float32), power_of_two, 0.0
    )
  plgpu.commit_smem()
  for half in range(2):
    left = half * (gate_up.shape[1] // 2) + column * SIDE
    where = rows, pl.ds(left, SIDE)
    plgpu.copy_smem_to_gmem(out.at[half], found.at[where])
    plgpu.copy_smem_to_gmem(small.at[half], q.at[where])
    block = half * (gate_up.shape[1] // (2 * SIDE)) + column
    plgpu.copy_smem_to_gmem(scale.at[half], scales.at[block, rows])
  plgpu.wait_smem_to_gmem(0)


def _inside(
  x: jax.Array, high: float | None, low: float | None
) -> jax.Array | float:
  """Returns the slope of a limited x: 1 inside, 0 outside, half on a border."""
  slope = 1.0
  for border, sign in ((high, 1.0), (low, -1.0)):
    if border is not None:
      over = sign * (x - border)
      step = jnp.where(over < 0, jnp.full_like(x, 1.0), jnp.full_like(x, 0.5))
      slope *= jnp.where(over > 0, jnp.zeros_like(x), step)
  return slope
