"""Grouped matmul of float8 numbers with block scales on Hopper.

Tensor cores add float8 products in about 14 bits, so each 128 of the contracted
dimension start from zero, and their sum is scaled and added in float32
(DeepSeek-V3, arXiv:2412.19437, section 3.3.2). They want both operands with
that dimension last.

Forward a third warpgroup starts the copies, for which 384 threads may have 168
registers each. A step of warpgroup 0 is then 128 instructions, not 214, beside
512 cycles of tensor cores for both (counted, not timed). The gradient of the
weights needs 184, so there warpgroup 0 does it.
Legend: M rows, E experts, D width in, F width out.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.quantize.reference import FP8
from pallas_kernels.warpgroups import wide

STEP = 128  # of the contracted dimension, and what a scale covers
STAGES = 4
STAGED = 64  # columns that leave through shared memory at once
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def forward(
  rows: jax.Array,
  row_scales: jax.Array,
  weights: jax.Array,
  weight_scales: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Returns the product [M F] of rows [M D] and weights [E F D], in `dtype`.

  Args:
    rows, row_scales: [M D] float8 and [M D/128] float32.
    weights, weight_scales: [E F D] float8 and [E F/128 D/128] float32.
    block_expert, used: as in grouped_matmul.
    dtype: bfloat16.

  Raises:
    NotImplementedError: dtypes or widths that the kernel can't take.
  """
  _supported(rows, weights, dtype)
  (M, D), F = rows.shape, weights.shape[1]
  block = M // block_expert.shape[0]
  tile = _tile_of(block, F)
  steps = D // STEP
  # A copy is a multiple of 16 bytes.
  padded = jnp.pad(weight_scales, ((0, 0), (0, 0), (0, -steps % 4)))
  scales = {
    'weight_scale': plgpu.SMEM(
      (tile.columns // STEP, padded.shape[2]), jnp.float32
    ),
    'scales_here': plgpu.Barrier(),
  }
  return compat.kernel(
    functools.partial(_body, tile=tile, block=block),
    jax.ShapeDtypeStruct((M, F), dtype),
    grid={'m': M // tile.rows, 'n': F // tile.columns},
    threads=3,
    scratch=_scratch(tile, 2 * tile.parts[0] + tile.parts[1]) | scales,
  )(rows, row_scales.T, weights, padded, block_expert, used[None])


def outer(
  rows: jax.Array,
  row_scales: jax.Array,
  grads: jax.Array,
  grad_scales: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  num_experts: int,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Sums rows @ grads.T over each expert's rows: [E D F] of dtype.

  Args:
    rows, grads: [D M] and [F M] float8, transposed.
    row_scales, grad_scales: [D M/128], [F M/128] float32.
    block_expert: [M // block]; blocks of one expert adjoin.
    used, num_experts, dtype: as elsewhere.
  """
  _supported(rows, grads, dtype)
  (D, M), F = rows.shape, grads.shape[0]
  block = M // block_expert.shape[0]
  if block % STEP:
    raise NotImplementedError(f'blocks of {block} rows, not {STEP} * n')
  for width in (D, F):
    if width % STEP:
      raise NotImplementedError(f'width {width}, not a multiple of {STEP}')
  first, count = gpu.runs(block_expert, used, num_experts, block // STEP)
  scales = {'grad_scale': plgpu.SMEM((STAGES, STEP), jnp.float32)}
  return compat.kernel(
    _outer_body,
    jax.ShapeDtypeStruct((num_experts, D, F), dtype),
    grid={'e': num_experts, 'm': D // STEP, 'n': F // STEP},
    threads=2,
    scratch=_scratch(gpu.Tile(STEP, STEP), arrivals=6) | scales,
  )(rows, row_scales.T, grads, grad_scales.T, first, count)


def _supported(
  left: jax.Array, right: jax.Array, dtype: jax.typing.DTypeLike
) -> None:
  """Raises NotImplementedError unless the kernel can take both dtypes."""
  if left.dtype != FP8 or right.dtype != FP8:
    raise NotImplementedError(
      f'dtype {left.dtype}/{right.dtype}, not {jnp.dtype(FP8).name}'
    )
  if dtype != jnp.bfloat16:
    raise NotImplementedError(f'result in {jnp.dtype(dtype)}, not bfloat16')


def _tile_of(rows_multiple: int, columns: int) -> gpu.Tile:
  """Returns an output tile; 128 columns at most beside 128 rows."""
  tile = gpu.tile_of(rows_multiple, columns)
  # Twice as many columns and the sum of a step: too many registers.
  return gpu.Tile(tile.rows, STEP) if tile.by_rows else tile


def _scratch(tile: gpu.Tile, arrivals: int) -> dict[str, Any]:
  """Tiles in shared memory; `arrivals` copies fill a stage."""
  parts_a, parts_b = tile.parts
  memory = lambda *shape: plgpu.SMEM(shape, FP8, transforms=compat.TILED_8BIT)
  return {
    'a': memory(STAGES, parts_a, 64, STEP),
    'b': memory(STAGES, parts_b, tile.own_columns, STEP),
    'row_scale': plgpu.SMEM((STAGES, parts_a, 64), jnp.float32),
    'staged': plgpu.SMEM(
      (2, 64, STAGED), jnp.bfloat16, transforms=compat.TILED_16BIT
    ),
    'here': plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  }


def _fill(steps: jax.Array, load: Callable) -> None:
  """Starts the copies of the first stages, from warpgroup 0."""

  @pl.when(lax.axis_index('wg') == 0)
  def _():
    def fill(stage: jax.Array, _) -> tuple:
      load(stage, stage)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())


def _fetch(steps: jax.Array, load: Callable, free: jax.Ref) -> None:
  """Starts the copies of every stage as it gets free."""

  def one(k: jax.Array, _) -> tuple:
    stage = lax.rem(k, STAGES)
    pl.when(k >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
    load(k, stage)
    return ()

  lax.fori_loop(0, steps, one, ())


def _sums(
  steps: jax.Array,
  load: Callable | None,
  add: Callable,
  pieces: list[tuple[int, int]],
  here: jax.Ref,
  free: jax.Ref,
) -> tuple[jax.Array, ...]:
  """Returns float32 pieces after `sums = add(k, stage, sums)` of every k.

  Warpgroup 0 also starts the copies, `load`, unless another warpgroup does.
  """

  def step(k: jax.Array, sums: tuple) -> tuple:
    stage = lax.rem(k, STAGES)
    # Wait: all copies of this stage have arrived.
    plgpu.barrier_wait(here.at[stage])
    sums = add(k, stage, sums)

    # Refill: once both warpgroups have read the stage.
    @pl.when(k + STAGES < steps)
    def _():
      plgpu.commit_smem()  # the scales were read before the copy writes anew
      plgpu.barrier_arrive(free.at[stage])
      if load is None:
        return

      @pl.when(lax.axis_index('wg') == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(k + STAGES, stage)

    return sums

  zeros = [compat.full(shape, 0.0, plgpu.Layout.WGMMA) for shape in pieces]
  return lax.fori_loop(0, steps, step, tuple(zeros))


def _product(a: jax.Ref, b: jax.Ref) -> jax.Array:
  """Returns a @ b.T of refs in shared memory, summed from zero."""

  def run(ref: jax.Ref) -> jax.Array:
    compat.wgmma(ref, a, compat.transposed(b))
    return ref[...]

  return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def _body(
  rows: jax.Ref, row_scales: jax.Ref, weights: jax.Ref, weight_scales: jax.Ref,
  block_expert: jax.Ref, used: jax.Ref, out: jax.Ref, a: jax.Ref, b: jax.Ref,
  row_scale: jax.Ref, staged: jax.Ref, here: jax.Ref, free: jax.Ref,
  weight_scale: jax.Ref, scales_here: jax.Ref, *, tile: gpu.Tile, block: int,
) -> None:  # fmt: skip
  """Computes one output tile of `forward`."""
  m, n = lax.axis_index('m'), lax.axis_index('n')
  at = lax.div(m, block // tile.rows)
  expert = block_expert[at]
  part_a, part_b = gpu.part(tile)
  # Filler takes no step: its rows come out as zeros.
  steps = jnp.where(at < used[0], rows.shape[1] // STEP, 0)
  groups = tile.columns // STEP  # scales across the tile

  # Load: 128 of the contracted dimension and the scales of its rows.
  def load(k: jax.Array, stage: jax.Array) -> None:
    inner = pl.ds(k * STEP, STEP)
    copy = lambda source, to: plgpu.copy_gmem_to_smem(
      source, to, here.at[stage]
    )
    for i in range(tile.parts[0]):
      where = pl.ds(m * tile.rows + i * 64, 64)
      copy(rows.at[where, inner], a.at[stage, i])
      copy(row_scales.at[k, where], row_scale.at[stage, i])
    for i in range(tile.parts[1]):
      where = pl.ds(n * tile.columns + i * tile.own_columns, tile.own_columns)
      copy(weights.at[expert, where, inner], b.at[stage, i])

  @pl.when(lax.axis_index('wg') == 2)
  def _():
    # Load: the weights' scales of all steps at once; they are few.
    which = pl.ds(n * groups, groups)
    plgpu.copy_gmem_to_smem(
      weight_scales.at[expert, which], weight_scale, scales_here
    )
    _fetch(steps, load, free)

  width = min(tile.own_columns, STEP)
  pieces = tile.own_columns // width
  # A warpgroup's first group; two share one if the tile has just one.
  first = lax.div(part_b * tile.own_columns, STEP)

  def add(k: jax.Array, stage: jax.Array, sums: tuple) -> tuple:
    # Matmul of one step, then its scales: a row's times a 128 x 128 block's.
    own = compat.load(row_scale, (stage, part_a), _BY_ROW)
    out = []
    for piece, total in enumerate(sums):
      scale = own * weight_scale[first + piece, k]
      scale = wide(scale, total.shape)
      columns = pl.ds(piece * width, width)
      product = _product(a.at[stage, part_a], b.at[stage, part_b, columns])
      out.append(total + product * scale)
    return tuple(out)

  @pl.when(lax.axis_index('wg') < 2)
  def _():
    plgpu.barrier_wait(scales_here)
    sums = _sums(steps, None, add, [(64, width)] * pieces, here, free)
    # Store: this warpgroup's part of the tile, piece by piece.
    top = m * tile.rows + part_a * 64
    left = n * tile.columns + part_b * tile.own_columns
    for piece, total in enumerate(sums):
      gpu.store(
        total,
        lambda columns, piece=piece: out.at[
          pl.ds(top, 64),
          pl.ds(left + piece * width + columns.start, columns.size),
        ],
        staged,
        width,
      )


def _outer_body(
  rows: jax.Ref, row_scales: jax.Ref, grads: jax.Ref, grad_scales: jax.Ref,
  first: jax.Ref, count: jax.Ref, out: jax.Ref, a: jax.Ref, b: jax.Ref,
  row_scale: jax.Ref, staged: jax.Ref, here: jax.Ref, free: jax.Ref,
  grad_scale: jax.Ref,
) -> None:  # fmt: skip
  """Computes one output tile of `outer`."""
  e, m, n, w = (lax.axis_index(axis) for axis in ('e', 'm', 'n', 'wg'))
  start, steps = first[e], count[e]
  columns = pl.ds(n * STEP, STEP)

  # Load: 128 rows of one expert, the last dimension of both operands.
  def load(k: jax.Array, stage: jax.Array) -> None:
    inner = pl.ds((start + k) * STEP, STEP)
    copy = lambda source, to: plgpu.copy_gmem_to_smem(
      source, to, here.at[stage]
    )
    for i in range(2):
      where = pl.ds(m * STEP + i * 64, 64)
      copy(rows.at[where, inner], a.at[stage, i])
      copy(row_scales.at[start + k, where], row_scale.at[stage, i])
    copy(grads.at[columns, inner], b.at[stage, 0])
    copy(grad_scales.at[start + k, columns], grad_scale.at[stage])

  _fill(steps, load)

  def add(k: jax.Array, stage: jax.Array, sums: tuple) -> tuple:
    # Matmul of one step, then both scales: here each is a vector.
    (total,) = sums
    down = compat.load(row_scale, (stage, w), _BY_ROW)
    across = compat.load(grad_scale, (stage,), _BY_COLUMN)
    product = _product(a.at[stage, w], b.at[stage, 0])
    return (
      total + product * wide(down, total.shape) * wide(across, total.shape, 1),
    )

  # An expert without rows takes no step, so its gradient is zero.
  (total,) = _sums(steps, load, add, [(64, STEP)], here, free)
  gpu.store(
    total,
    lambda piece: out.at[
      e,
      pl.ds(m * STEP + w * 64, 64),
      pl.ds(n * STEP + piece.start, piece.size),
    ],
    staged,
    STEP,
  )
