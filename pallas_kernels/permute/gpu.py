"""Weighted sums of gathered rows on Hopper: all of permute and combine.

permute, combine and their gradients to rows are one kernel:
out[i] = sum_j scale[i, j] * x[index[i, j]], where an index past the end adds
nothing. A warpgroup reads each row in 16-byte pieces straight into registers
and keeps several rows in flight; nothing goes through shared memory.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize import gpu as quantize

_THREADS = 128
_IN_FLIGHT = 8  # rows that a warpgroup reads at once


def permute(x, plan):
  K = plan.slot.shape[1]
  return _gather(x, plan.source[:, None] // K, None)


def permute_fp8(x, plan, power_of_two):
  q, scales = quantize.quantize(x, (1, 128), power_of_two)
  token = plan.source // plan.slot.shape[1]
  # Four numbers travel as one float32, which no kernel changes on its way.
  words = q.reshape(*q.shape[:-1], -1, 4)
  words = lax.bitcast_convert_type(words, jnp.float32)
  moved = _gather(words, token[:, None], None)
  rows = lax.bitcast_convert_type(moved, q.dtype).reshape(-1, q.shape[-1])
  return rows, jnp.take(scales, token, axis=0, mode='fill', fill_value=0)


def permute_bwd(grad, plan):
  return _gather(grad, plan.slot, None)


def combine(rows, weights, plan):
  return _gather(rows, plan.slot, weights.astype(jnp.float32))


def combine_bwd(rows, weights, plan, grad):
  flat = weights.astype(jnp.float32).reshape(-1, 1)
  scale = jnp.take(flat, plan.source, axis=0, mode='fill', fill_value=0)
  token = plan.source[:, None] // plan.slot.shape[1]
  drows = _gather(grad.astype(rows.dtype), token, scale)
  dots = _dots(grad.astype(rows.dtype), rows, plan.slot)
  return drows, dots.astype(weights.dtype)


def _chunk(x) -> int:
  """Columns that one warpgroup reads at once: up to 16 bytes a thread."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'dtype {x.dtype}, not bfloat16 or float32')
  for vector in (16 // x.dtype.itemsize, 4, 2):
    if x.shape[-1] % (_THREADS * vector) == 0:
      return _THREADS * vector
  raise NotImplementedError(f'width {x.shape[-1]}, not a multiple of 256')


def _rows_per_block(count: int, terms: int) -> int:
  rows = max(_IN_FLIGHT // terms, 1)
  while count % rows:
    rows //= 2
  return rows


def _read(x, at, columns):
  """x[at, columns] in float32; zeros if `at` lies past the end."""
  size = columns.size
  layout = plgpu.Layout.WG_STRIDED((size,), vec_size=size // _THREADS)
  last = x.shape[0] - 1
  row = compat.load(
    x, (jnp.minimum(at, last), columns), layout, optimized=False
  )
  inside = jnp.broadcast_to(at, (size,)) <= last
  return jnp.where(inside, row.astype(jnp.float32), jnp.zeros((size,)))


def _gather(x, index, scale):
  """out[i] = sum_j scale[i, j] * x[index[i, j]], summed in float32."""
  chunk, (count, terms) = _chunk(x), index.shape
  rows = _rows_per_block(count, terms)
  inputs = (x, index) if scale is None else (x, index, scale)
  return compat.kernel(
    functools.partial(_gather_body, rows=rows, chunk=chunk),
    jax.ShapeDtypeStruct((count, x.shape[1]), x.dtype),
    grid={'group': count // rows},
  )(*inputs)


def _gather_body(x, index, *rest, rows, chunk):
  *scale, out = rest
  first = lax.axis_index('group') * rows

  def total(i, columns):
    terms = range(index.shape[1])
    values = [_read(x, index[i, j], columns) for j in terms]
    if scale:
      values = [value * scale[0][i, j] for j, value in enumerate(values)]
    return sum(values[1:], values[0])

  def column(c, _):
    columns = pl.ds(c * chunk, chunk)
    # All reads before any write: the compiler can't tell that they differ.
    totals = [total(first + i, columns) for i in range(rows)]
    for i in range(rows):
      out[first + i, columns] = totals[i].astype(out.dtype)
    return ()

  lax.fori_loop(0, x.shape[1] // chunk, column, ())


def _dots(x, y, index):
  """out[i, j] = <x[i], y[index[i, j]]> in float32."""
  chunk = _chunk(x)
  return compat.kernel(
    functools.partial(_dots_body, chunk=chunk),
    jax.ShapeDtypeStruct(index.shape, jnp.float32),
    grid={'row': index.shape[0]},
  )(x, y, index)


def _dots_body(x, y, index, out, *, chunk):
  i = lax.axis_index('row')
  layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // _THREADS)
  terms = range(index.shape[1])

  def column(c, totals):
    columns = pl.ds(c * chunk, chunk)
    own = _read(x, i, columns)
    return tuple(
      totals[j] + own * _read(y, index[i, j], columns) for j in terms
    )

  zero = compat.full((chunk,), 0.0, layout)
  totals = lax.fori_loop(0, x.shape[1] // chunk, column, (zero,) * len(terms))
  for j in terms:
    out[i, j] = totals[j].sum()
