"""Grouped matmul in bfloat16 on Hopper.

A thread block owns one output tile of 128 (or 64) rows of one expert; its two
warpgroups multiply 64 x 256 each out of a ring of tiles that warpgroup 0
refills by TMA. Without a warpgroup for loading the kernel needs no setmaxnreg,
which some compilers ignore: two warpgroups get 255 registers a thread.
Legend: M rows, E experts, D width in, F width out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

STEP = 64  # of the contracted dimension: 128 bytes, one swizzled row
STAGES = 4
STAGED = 128  # columns that leave through shared memory at once


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes an output tile that two warpgroups share."""

  rows: int  # 128: each warpgroup has 64 rows; 64: each has half the columns
  columns: int

  @property
  def by_rows(self) -> bool:
    """Returns whether the warpgroups share the rows, not the columns."""
    return self.rows == 128

  @property
  def own_columns(self) -> int:
    """Returns the columns that one warpgroup computes."""
    return self.columns if self.by_rows else self.columns // 2

  @property
  def parts(self) -> tuple[int, int]:
    """Returns the pieces of the left and of the right operand."""
    return (2, 1) if self.by_rows else (1, 2)


def tile_of(rows_multiple: int, columns: int) -> Tile:
  """Returns the largest tile that divides rows and columns."""
  rows = 128 if rows_multiple % 128 == 0 else 64
  if rows_multiple % 64:
    raise NotImplementedError(f'rows in steps of {rows_multiple}, not 64 * n')
  for width in (256, 128):
    if columns % width == 0:
      return Tile(rows, width)
  raise NotImplementedError(f'width {columns}, not a multiple of 128')


def supported(*arrays: jax.Array) -> None:
  """Raises NotImplementedError unless all arrays are bfloat16."""
  for array in arrays:
    if array.dtype != jnp.bfloat16:
      raise NotImplementedError(f'dtype {array.dtype}, not bfloat16')


def forward(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
) -> jax.Array:
  """Returns the product [M F] of rows [M D] and weights [E D F] or [E F D]."""
  supported(rows, weights)
  (M, D), F = rows.shape, weights.shape[1 if transpose else 2]
  block = M // block_expert.shape[0]
  tile = tile_of(block, F)
  if D % STEP:
    raise NotImplementedError(f'width {D}, not a multiple of {STEP}')
  body = functools.partial(
    _forward_body, tile=tile, transpose=transpose, block=block
  )
  b_shape = (tile.own_columns, STEP) if transpose else (STEP, tile.own_columns)
  return compat.kernel(
    body,
    jax.ShapeDtypeStruct((M, F), rows.dtype),
    grid={'m': M // tile.rows, 'n': F // tile.columns},
    threads=2,
    scratch=_scratch(tile, (64, STEP), b_shape),
  )(rows, weights, block_expert, used[None])


def outer(
  rows: jax.Array,
  grads: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  num_experts: int,
) -> jax.Array:
  """Sums rows.T @ grads over each expert's rows: [E D F] bfloat16.

  Blocks of one expert must adjoin, as they do in a plan.
  """
  supported(rows, grads)
  (M, D), F = rows.shape, grads.shape[1]
  block = M // block_expert.shape[0]
  if block % STEP:
    raise NotImplementedError(f'blocks of {block} rows, not 64 * n')
  tile = tile_of(D, F)
  first, count = runs(block_expert, used, num_experts, block // STEP)
  body = functools.partial(_outer_body, tile=tile)
  return compat.kernel(
    body,
    jax.ShapeDtypeStruct((num_experts, D, F), rows.dtype),
    grid={'e': num_experts, 'm': D // tile.rows, 'n': F // tile.columns},
    threads=2,
    scratch=_scratch(tile, (STEP, 64), (STEP, tile.own_columns)),
  )(rows, grads, first, count)


def runs(
  block_expert: jax.Array, used: jax.Array, num_experts: int, steps: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the first step and the steps of each expert, both int32 [E]."""
  index = jnp.arange(block_expert.shape[0], dtype=jnp.int32)
  ids = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
  own = (block_expert == ids) & (index < used)  # [E blocks]
  # An expert without blocks begins anywhere, for it takes no step.
  first = jnp.argmax(own, axis=1).astype(jnp.int32)
  return first * steps, own.sum(1, dtype=jnp.int32) * steps


def _scratch(
  tile: Tile, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> dict[str, Any]:
  """Returns the ring of operand tiles and what the result leaves by."""
  memory = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  parts_a, parts_b = tile.parts
  return {
    'a': memory(STAGES, parts_a, *a_shape),
    'b': memory(STAGES, parts_b, *b_shape),
    'staged': memory(2, 64, min(STAGED, tile.own_columns)),
    'here': plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  }


def ring(
  steps: jax.Array,
  load: Callable,
  multiply: Callable,
  here: jax.Ref,
  free: jax.Ref,
  products: int = 1,
) -> None:
  """Calls multiply(stage) for every step while later stages are loading."""
  w = lax.axis_index('wg')

  # Load: every stage is on its way before the first product.
  @pl.when(w == 0)
  def _():
    def fill(stage: jax.Array, _) -> tuple:
      load(stage, stage)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  def step(k: jax.Array, _) -> tuple:
    stage = lax.rem(k, STAGES)
    # Wait, then matmul: asynchronous, it runs on into the next step.
    plgpu.barrier_wait(here.at[stage])
    multiply(stage)
    plgpu.wgmma_wait(products)  # the previous step is done reading
    last, again = lax.rem(k + (STAGES - 1), STAGES), k + (STAGES - 1)

    # Refill: the stage of the previous step, once both have read it.
    @pl.when((k > 0) & (again < steps))
    def _():
      plgpu.barrier_arrive(free.at[last])

      @pl.when(w == 0)
      def _():
        plgpu.barrier_wait(free.at[last])
        load(again, last)

    return ()

  lax.fori_loop(0, steps, step, ())


def _sum(
  columns: int,
  steps: jax.Array,
  load: Callable,
  multiply: Callable,
  here: jax.Ref,
  free: jax.Ref,
) -> jax.Array:
  """Returns the float32 [64, columns] that multiply(ref, stage) adds up."""

  def run(ref: jax.Ref) -> jax.Array:
    ring(steps, load, functools.partial(multiply, ref), here, free)
    return ref[...]

  return pl.run_scoped(run, plgpu.ACC((64, columns), jnp.float32))


def store(
  acc: jax.Array,
  out_tile: Callable[[pl.Slice], jax.Ref],
  staged: jax.Ref,
  own_columns: int,
) -> None:
  """Stores acc [64 .] by shared memory, some columns at a time."""
  w = lax.axis_index('wg')
  width = min(staged.shape[-1], own_columns)
  for start in range(0, own_columns, width):
    # The staging tile is free once its last piece has left.
    if start:
      plgpu.wait_smem_to_gmem(0)
    piece = lax.slice(acc, (0, start), (64, start + width))
    staged[w] = piece.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[w], out_tile(pl.ds(start, width)))
  plgpu.wait_smem_to_gmem(0)


def part(tile: Tile) -> tuple:
  """Returns which piece of a and which of b this warpgroup multiplies."""
  w = lax.axis_index('wg')
  return (w, 0) if tile.by_rows else (0, w)


def _forward_body(
  rows: jax.Ref, weights: jax.Ref, block_expert: jax.Ref, used: jax.Ref,
  out: jax.Ref, a: jax.Ref, b: jax.Ref, staged: jax.Ref, here: jax.Ref,
  free: jax.Ref, *, tile: Tile, transpose: bool, block: int,
) -> None:  # fmt: skip
  """Computes one output tile of `forward`."""
  m, n = lax.axis_index('m'), lax.axis_index('n')
  at = lax.div(m, block // tile.rows)
  expert = block_expert[at]
  part_a, part_b = part(tile)
  # Filler gets zeros: no step at all.
  steps = jnp.where(at < used[0], rows.shape[1] // STEP, 0)

  # Load: rows of the tile, and the expert's matrix as it is stored.
  def load(k: jax.Array, stage: jax.Array) -> None:
    inner = pl.ds(k * STEP, STEP)
    for i in range(tile.parts[0]):
      where = pl.ds(m * tile.rows + i * 64, 64)
      plgpu.copy_gmem_to_smem(
        rows.at[where, inner], a.at[stage, i], here.at[stage]
      )
    for i in range(tile.parts[1]):
      where = pl.ds(n * tile.columns + i * tile.own_columns, tile.own_columns)
      source = (expert, where, inner) if transpose else (expert, inner, where)
      plgpu.copy_gmem_to_smem(
        weights.at[source], b.at[stage, i], here.at[stage]
      )

  def multiply(ref: jax.Ref, stage: jax.Array) -> None:
    # Matmul: the transposed matrix is only read in another order.
    right = b.at[stage, part_b]
    right = compat.transposed(right) if transpose else right
    compat.wgmma(ref, a.at[stage, part_a], right)

  acc = _sum(tile.own_columns, steps, load, multiply, here, free)
  # Store: this warpgroup's part of the tile.
  top = m * tile.rows + part_a * 64
  left = n * tile.columns + part_b * tile.own_columns
  store(
    acc,
    lambda columns: out.at[
      pl.ds(top, 64), pl.ds(left + columns.start, columns.size)
    ],
    staged,
    tile.own_columns,
  )


def _outer_body(
  rows: jax.Ref, grads: jax.Ref, first: jax.Ref, count: jax.Ref, out: jax.Ref,
  a: jax.Ref, b: jax.Ref, staged: jax.Ref, here: jax.Ref, free: jax.Ref, *,
  tile: Tile,
) -> None:  # fmt: skip
  """Computes one output tile of `outer`."""
  e, m, n = (lax.axis_index(axis) for axis in ('e', 'm', 'n'))
  start = first[e]
  part_a, part_b = part(tile)

  # Load: 64 rows of both operands; their widths make up the tile.
  def load(k: jax.Array, stage: jax.Array) -> None:
    inner = pl.ds((start + k) * STEP, STEP)
    for i in range(tile.parts[0]):
      where = pl.ds(m * tile.rows + i * 64, 64)
      plgpu.copy_gmem_to_smem(
        rows.at[inner, where], a.at[stage, i], here.at[stage]
      )
    for i in range(tile.parts[1]):
      where = pl.ds(n * tile.columns + i * tile.own_columns, tile.own_columns)
      plgpu.copy_gmem_to_smem(
        grads.at[inner, where], b.at[stage, i], here.at[stage]
      )

  def multiply(ref: jax.Ref, stage: jax.Array) -> None:
    # Matmul: over rows, so the left tile is read transposed.
    left = compat.transposed(a.at[stage, part_a])
    compat.wgmma(ref, left, b.at[stage, part_b])

  acc = _sum(tile.own_columns, count[e], load, multiply, here, free)
  # Store: an expert without rows takes no step and gets zeros.
  top = m * tile.rows + part_a * 64
  left = n * tile.columns + part_b * tile.own_columns
  store(
    acc,
    lambda columns: out.at[
      e, pl.ds(top, 64), pl.ds(left + columns.start, columns.size)
    ],
    staged,
    tile.own_columns,
  )
