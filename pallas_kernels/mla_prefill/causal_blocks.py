"""Tiles, products and the ring of stages that mla_prefill's kernels share.

Each has two warpgroups of 64 rows and a ring of blocks that warpgroup 0
refills.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

TILE, ROWS, BLOCK, STAGES = 128, 64, 64, 2
WIDE, VALUE = 192, 128  # dims of queries and keys, of values
WGMMA = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
LOG2E = math.log2(math.e)


def memory(*shape: int) -> pl.MemoryRef:
  """Returns bfloat16 shared memory in tiles that wgmma reads."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=compat.TILED_16BIT)


def grid(q: jax.Array) -> dict[str, int]:
  """Returns the grid over batch, heads and tiles of 128 tokens."""
  return {'b': q.shape[0], 'h': q.shape[2], 'm': q.shape[1] // TILE}


def place(tiles: int) -> tuple[jax.Array, ...]:
  """Returns batch, head, tile and warpgroup; the longest tiles start first."""
  b, h, m, w = (lax.axis_index(a) for a in ('b', 'h', 'm', 'wg'))
  return b, h, tiles - 1 - m, w


def stream(
  steps: jax.Array, load: Callable, use: Callable, carry: Any, free: jax.Ref
) -> Any:
  """Folds use(step, stage, carry) with the next blocks on their way."""
  w = lax.axis_index('wg')

  # Load: all stages are on their way before the first step.
  @pl.when(w == 0)
  def _():
    def fill(step: jax.Array, _) -> tuple:
      load(step, step)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  def step(i: jax.Array, carry: Any) -> Any:
    stage = lax.rem(i, STAGES)
    carry = use(i, stage, carry)

    # Refill: once both warpgroups have read the stage.
    @pl.when(i + STAGES < steps)
    def _():
      plgpu.barrier_arrive(free.at[stage])

      @pl.when(w == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(i + STAGES, stage)

    return carry

  return lax.fori_loop(0, steps, step, carry)


def product(a: jax.Ref, b: jax.Ref, columns: int) -> jax.Array:
  """Returns a @ b.T of refs, a float32 [64, columns] in registers."""

  def run(ref: jax.Ref) -> jax.Array:
    def part(i: jax.Array, _) -> tuple:
      # 128 bytes a row, the width of a swizzled tile.
      inner = (slice(None), pl.ds(i * 64, 64))
      compat.wgmma(ref, a.at[inner], compat.transposed(b.at[inner]))
      return ()

    lax.fori_loop(0, a.shape[1] // 64, part, ())
    return ref[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))


def add_product(acc: jax.Array, a: jax.Ref, b: jax.Ref) -> jax.Array:
  """Returns acc + a @ b of refs."""

  def run(ref: jax.Ref) -> None:
    compat.wgmma(ref, a, b)
    plgpu.wgmma_wait(0)

  return compat.accumulate(acc, run)


def wide(values: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
  """Returns a vector broadcast to `shape`, where it lies along `axis`."""
  return lax.broadcast_in_dim(values, shape, [axis])


def iota(
  shape: tuple[int, ...], axis: int, offset: int | jax.Array
) -> jax.Array:
  """Returns offset + the row (axis 0) or column (axis 1) of each entry."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) + offset


def zeros(columns: int) -> jax.Array:
  """Returns float32 zeros [64, columns]."""
  return compat.full((ROWS, columns), 0.0, WGMMA)
