"""Grouped matmul of float8 numbers with block scales on Hopper.

Tensor cores add float8 products in about 14 bits, so each 128 of the contracted
dimension start from zero, and their sum is scaled and added in float32
(DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
Legend: M rows, E experts, D width in, F width out.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.quantize.reference import FP8

STEP = 128  # of the contracted dimension, and what a scale covers
STAGES = 4
STAGED = 64  # columns that leave through shared memory at once
_TILED = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(128))
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def forward(
  rows, row_scales, weights, weight_scales, block_expert, used, dtype
):
  """rows [M D], weights [E F D], scales of both -> [M F] of dtype."""
  if rows.dtype != FP8 or weights.dtype != FP8:
    raise NotImplementedError(
      f'dtype {rows.dtype}/{weights.dtype}, not {jnp.dtype(FP8).name}'
    )
  if dtype != jnp.bfloat16:
    raise NotImplementedError(f'result in {jnp.dtype(dtype)}, not bfloat16')
  (M, D), F = rows.shape, weights.shape[1]
  block = M // block_expert.shape[0]
  tile = gpu.tile_of(block, F)
  if tile.by_rows:
    # Twice as many columns and the sum of a step: too many registers.
    tile = gpu.Tile(tile.rows, STEP)
  steps = D // STEP
  # A copy is a multiple of 16 bytes.
  padded = jnp.pad(weight_scales, ((0, 0), (0, 0), (0, -steps % 4)))
  return compat.kernel(
    functools.partial(_body, tile=tile, block=block),
    jax.ShapeDtypeStruct((M, F), dtype),
    grid={'m': M // tile.rows, 'n': F // tile.columns},
    threads=2,
    scratch=_scratch(tile, padded.shape[2]),
  )(rows, row_scales.T, weights, padded, block_expert, used[None])


def _scratch(tile, steps):
  parts_a, parts_b = tile.parts
  memory = lambda *shape: plgpu.SMEM(shape, FP8, transforms=_TILED)
  return {
    'a': memory(STAGES, parts_a, 64, STEP),
    'b': memory(STAGES, parts_b, tile.own_columns, STEP),
    'row_scale': plgpu.SMEM((STAGES, parts_a, 64), jnp.float32),
    'weight_scale': plgpu.SMEM((tile.columns // STEP, steps), jnp.float32),
    'staged': plgpu.SMEM(
      (2, 64, STAGED), jnp.bfloat16, transforms=compat.TILED_16BIT
    ),
    'scales_here': plgpu.Barrier(),
    'here': plgpu.Barrier(
      num_arrivals=2 * parts_a + parts_b, num_barriers=STAGES
    ),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  }


def _body(
  rows, row_scales, weights, weight_scales, block_expert, used, out,
  a, b, row_scale, weight_scale, staged, scales_here, here, free,
  *, tile, block,
):  # fmt: skip
  m, n, w = (lax.axis_index(axis) for axis in ('m', 'n', 'wg'))
  at = lax.div(m, block // tile.rows)
  expert = block_expert[at]
  part_a, part_b = gpu.part(tile)
  steps = jnp.where(at < used[0], rows.shape[1] // STEP, 0)
  groups = tile.columns // STEP  # scales across the tile

  def load(k, stage):
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

  @pl.when(w == 0)
  def _():
    plgpu.copy_gmem_to_smem(
      weight_scales.at[expert, pl.ds(n * groups, groups)],
      weight_scale,
      scales_here,
    )

    def fill(stage, _):
      load(stage, stage)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  plgpu.barrier_wait(scales_here)
  width = min(tile.own_columns, STEP)
  pieces = tile.own_columns // width
  # A warpgroup's first group; two share one if the tile has just one.
  first = lax.div(part_b * tile.own_columns, STEP)

  def product(stage, piece):
    def run(ref):
      right = b.at[stage, part_b, pl.ds(piece * width, width)]
      compat.wgmma(ref, a.at[stage, part_a], compat.transposed(right))
      return ref[...]

    return pl.run_scoped(run, plgpu.ACC((64, width), jnp.float32))

  def step(k, sums):
    stage = lax.rem(k, STAGES)
    plgpu.barrier_wait(here.at[stage])
    own = compat.load(row_scale, (stage, part_a), _BY_ROW)
    out = []
    for piece, total in enumerate(sums):
      scale = own * weight_scale[first + piece, k]
      scale = lax.broadcast_in_dim(scale, total.shape, [0])
      out.append(total + product(stage, piece) * scale)

    @pl.when(k + STAGES < steps)
    def _():
      plgpu.commit_smem()  # the scales were read before the copy writes anew
      plgpu.barrier_arrive(free.at[stage])

      @pl.when(w == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(k + STAGES, stage)

    return tuple(out)

  zero = compat.full((64, width), 0.0, plgpu.Layout.WGMMA)
  sums = lax.fori_loop(0, steps, step, (zero,) * pieces)
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
