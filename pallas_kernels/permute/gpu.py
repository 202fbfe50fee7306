"""permute, combine and their gradients on Hopper, a warpgroup per token.

Dispatch (permute, permute_fp8, combine_bwd): a warpgroup reads a token once,
keeps it in registers and writes it to all of its slots; more programs of the
same launch zero the rows of filler. Each row has one writer.
Combine (combine, permute_bwd): a warpgroup gathers a token's slots and adds,
out[n] = sum_k scale[n, k] * x[slot[n, k]]. A slot past the end is nowhere.
A thread moves up to 16 bytes at once, and nothing goes through shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array

from pallas_kernels import compat
from pallas_kernels.permute.reference import Plan
from pallas_kernels.quantize import gpu as quantize
from pallas_kernels.quantize.reference import FP8

_THREADS = 128
_IN_FLIGHT = 8  # times 16 bytes that a thread reads at once
_ROWS = 8  # that one program of filler looks at


class _RowMover(NamedTuple):
  """Describes how a warpgroup moves part of a row, a slice of axis 1.

  Attributes:
    size: of the slice.
    read: (x, n, part) -> value in registers.
    write: (value, row, part, *outs).
    zero: () -> value for filler.
  """

  size: int
  read: Callable
  write: Callable
  zero: Callable


def permute(x: jax.Array, plan: Plan) -> jax.Array:
  """Returns the rows [M D] of tokens x [N D]."""
  out = jax.ShapeDtypeStruct((plan.source.shape[0], x.shape[1]), x.dtype)
  return _spread(x, plan, out, _plain(x))


def permute_fp8(
  x: jax.Array, plan: Plan, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the rows [M D] float8 and their scales [M D/128]."""
  how = _quantised(x, power_of_two, floor)
  N, M, blocks = x.shape[0], plan.source.shape[0], x.shape[1] // quantize.SIDE
  outs = (
    jax.ShapeDtypeStruct((M, blocks, quantize.SIDE), FP8),
    jax.ShapeDtypeStruct((M, blocks), jnp.float32),
  )
  tiles = x.reshape(N, blocks, quantize.SIDE)
  rows, scales = _spread(tiles, plan, outs, how)
  return rows.reshape(M, -1), scales


def permute_bwd(grad: jax.Array, plan: Plan) -> jax.Array:
  """Returns the tokens' gradient [N D] of the rows' gradient [M D]."""
  return _gather(grad, plan.slot, None)


def combine(rows: jax.Array, weights: jax.Array, plan: Plan) -> jax.Array:
  """Returns the weighted sums [N D] of rows [M D]."""
  return _gather(rows, plan.slot, weights.astype(jnp.float32))


def combine_bwd(
  rows: jax.Array, weights: jax.Array, plan: Plan, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of rows [M D] and weights [N K]."""
  how = _plain(rows)
  outs = (
    jax.ShapeDtypeStruct(rows.shape, rows.dtype),
    # A sum for each part of a token.
    jax.ShapeDtypeStruct(
      (rows.shape[1] // how.size, *weights.shape), jnp.float32
    ),
  )
  drows, dots = _by_token(
    functools.partial(_weigh, how),
    lambda row, part, *refs: how.write(how.zero(), row, part, refs[3]),
    how.size,
    plan,
    (grad.astype(rows.dtype), rows, weights.astype(jnp.float32)),
    outs,
  )
  return drows, dots.sum(0).astype(weights.dtype)


def _chunk(x: jax.Array) -> int:
  """Returns the columns that a warpgroup reads at once, 16 bytes a thread."""
  quantize.check_dtype(x)
  for vector in (16 // x.dtype.itemsize, 4, 2):
    if x.shape[-1] % (_THREADS * vector) == 0:
      return _THREADS * vector
  raise NotImplementedError(f'width {x.shape[-1]}, not a multiple of 256')


def _together(count: int) -> int:
  """Returns the largest part of `count` pieces that divides it."""
  return max(n for n in range(1, _IN_FLIGHT + 1) if count % n == 0)


def _plain(x: jax.Array) -> _RowMover:
  """Returns how to move columns of [N D] as they are."""
  chunk = _chunk(x)
  size = chunk * _together(x.shape[1] // chunk)
  # Neighbouring threads read neighbouring vectors of up to 16 bytes.
  layout = plgpu.Layout.WG_STRIDED((size,), vec_size=chunk // _THREADS)

  def write(value: Any, row: jax.Array, part: pl.Slice, out: jax.Ref) -> None:
    out[row, part] = value

  return _RowMover(
    size,
    lambda x, n, part: compat.load(x, (n, part), layout, optimized=False),
    write,
    lambda: compat.full((size,), 0.0, layout, x.dtype),
  )


def _quantised(x: jax.Array, power_of_two: bool, floor: float) -> _RowMover:
  """Returns how to move blocks of [N D/128 128] in float8, with scales."""
  quantize.check_dtype(x)
  tile = next((n for n in (8, 4) if x.shape[1] % (n * quantize.SIDE) == 0), 0)
  if not tile:
    raise NotImplementedError(f'width {x.shape[1]}, not a multiple of 512')
  size = tile * _together(x.shape[1] // (tile * quantize.SIDE))
  layout = _within_warps(tile)

  def read(x: jax.Ref, n: jax.Array, part: pl.Slice) -> Any:
    values = compat.load(x, (n, part, slice(None)), layout, optimized=False)
    return quantize.by_row(values.astype(jnp.float32), power_of_two, floor)

  def write(
    value: Any, row: jax.Array, part: pl.Slice, out: jax.Ref, scales: jax.Ref
  ) -> None:
    compat.store(out, (row, part, slice(None)), value[0])
    compat.store(scales, (row, part), value[1])

  def zero() -> Any:
    q = compat.full((size, quantize.SIDE), 0.0, layout).astype(FP8)
    return q, compat.full((size,), 0.0, layout.reduce(1))

  return _RowMover(size, read, write, zero)


def _within_warps(tile: int) -> Any:
  """Returns the layout of [tile 128] in which a warp has whole rows."""
  rows = tile // 4  # of a warp
  below = (2, 128) if rows == 2 else (128,)
  return plgpu.Layout.TILED(
    fragmented_array.Tiling(((tile, 128), below, (tile,))),
    warp_dims=(-3 - rows,),
    lane_dims=(-3, -2)[2 - rows :],
    vector_dim=-1,
  )


def _by_token(
  token: Callable,
  clear: Callable,
  size: int,
  plan: Plan,
  inputs: tuple[jax.Array, ...],
  outs: Any,
) -> Any:
  """Launches a kernel that writes all rows, by token or as filler.

  Args:
    token: (n, part, slot, *refs): writes this part of a token's rows.
    clear: (row, part, *refs): writes it for a row of filler.
    size: of a part.
    plan: of the layout.
    inputs: arrays; the first is by token, and [N D] or [N D/128 128].
    outs: shapes of the results. refs are those of inputs and results.
  """
  (N, K), M = plan.slot.shape, plan.source.shape[0]

  def body(slot: jax.Ref, source: jax.Ref, *refs: jax.Ref) -> None:
    part = pl.ds(lax.axis_index('part') * size, size)
    program = lax.axis_index('program')

    # Programs 0 to N - 1: a token each, and the rows that it owns.
    @pl.when(program < N)
    def _():
      token(program, part, slot, *refs)

    @pl.when(program >= N)
    def _():
      # Past the end is the last row again.
      top = (program - N) * _ROWS
      rows = [jnp.minimum(top + i, M - 1) for i in range(_ROWS)]
      empty = [source[row] >= N * K for row in rows]
      for row, is_filler in zip(rows, empty):
        pl.when(is_filler)(functools.partial(clear, row, part, *refs))

  # Programs last: all axes but that one end at 65,535.
  grid = {
    'part': inputs[0].shape[1] // size,
    'program': N + pl.cdiv(M, _ROWS),
  }
  return compat.kernel(body, outs, grid=grid)(plan.slot, plan.source, *inputs)


def _spread(x: jax.Array, plan: Plan, outs: Any, how: _RowMover) -> Any:
  """Writes every token to all of its rows, and zeros to the others."""

  def token(
    n: jax.Array, part: pl.Slice, slot: jax.Ref, x: jax.Ref, *outs: jax.Ref
  ) -> None:
    # Load once, store to every row: K reads of a token are saved.
    value = how.read(x, n, part)

    def choice(k: jax.Array, _) -> tuple:
      row = slot[n, k]

      # Slot M: the choice goes nowhere.
      @pl.when(row < outs[0].shape[0])
      def _():
        how.write(value, row, part, *outs)

      return ()

    lax.fori_loop(0, slot.shape[1], choice, ())

  clear = lambda row, part, _, *outs: how.write(how.zero(), row, part, *outs)
  return _by_token(token, clear, how.size, plan, (x,), outs)


def _weigh(
  how: _RowMover, n: jax.Array, part: pl.Slice, slot: jax.Ref, grad: jax.Ref,
  rows: jax.Ref, weights: jax.Ref, drows: jax.Ref, dots: jax.Ref,
) -> None:  # fmt: skip
  """Writes weights[n, k] * grad[n] to every row of n, and <grad[n], row>."""
  at, M = lax.axis_index('part'), rows.shape[0]
  # Load the token's gradient once for all of its choices.
  own = how.read(grad, n, part)

  def choice(k: jax.Array, _) -> tuple:
    row = slot[n, k]

    @pl.when(row < M)
    def _():
      # Both gradients of a choice read its row once.
      gradient = own.astype(jnp.float32)
      value = how.read(rows, row, part).astype(jnp.float32)
      scaled = gradient * weights[n, k]
      how.write(scaled.astype(own.dtype), row, part, drows)
      dots[at, n, k] = (gradient * value).sum()

    @pl.when(row >= M)
    def _():
      # A choice that went nowhere has no gradient, but needs a number.
      dots[at, n, k] = jnp.float32(0)

    return ()

  lax.fori_loop(0, slot.shape[1], choice, ())


def _rows_per_block(count: int, terms: int) -> int:
  """Returns how many results a thread block sums at once."""
  rows = max(_IN_FLIGHT // terms, 1)
  while count % rows:
    rows //= 2
  return rows


def _read(x: jax.Ref, at: jax.Array, columns: pl.Slice) -> jax.Array:
  """Loads x[at, columns] in float32; zeros if `at` lies past the end."""
  size = columns.size
  layout = plgpu.Layout.WG_STRIDED((size,), vec_size=size // _THREADS)
  last = x.shape[0] - 1
  row = compat.load(
    x, (jnp.minimum(at, last), columns), layout, optimized=False
  )
  inside = jnp.broadcast_to(at, (size,)) <= last
  return jnp.where(inside, row.astype(jnp.float32), jnp.zeros((size,)))


def _gather(
  x: jax.Array, index: jax.Array, scale: jax.Array | None
) -> jax.Array:
  """Returns out[i] = sum_j scale[i, j] x[index[i, j]], summed in float32."""
  chunk, (count, terms) = _chunk(x), index.shape
  rows = _rows_per_block(count, terms)
  inputs = (x, index) if scale is None else (x, index, scale)
  return compat.kernel(
    functools.partial(_gather_body, rows=rows, chunk=chunk),
    jax.ShapeDtypeStruct((count, x.shape[1]), x.dtype),
    grid={'group': count // rows},
  )(*inputs)


def _gather_body(
  x: jax.Ref, index: jax.Ref, *rest: jax.Ref, rows: int, chunk: int
) -> None:
  """Computes `rows` results, a chunk of columns at a time."""
  *scale, out = rest
  first = lax.axis_index('group') * rows

  def total(i: int | jax.Array, columns: pl.Slice) -> jax.Array:
    terms = range(index.shape[1])
    values = [_read(x, index[i, j], columns) for j in terms]
    if scale:
      values = [value * scale[0][i, j] for j, value in enumerate(values)]
    return sum(values[1:], values[0])

  def column(c: jax.Array, _) -> tuple:
    columns = pl.ds(c * chunk, chunk)
    # All reads before any write: the compiler can't tell that they differ.
    totals = [total(first + i, columns) for i in range(rows)]
    # Store: rounded once, after all terms.
    for i in range(rows):
      out[first + i, columns] = totals[i].astype(out.dtype)
    return ()

  lax.fori_loop(0, x.shape[1] // chunk, column, ())
