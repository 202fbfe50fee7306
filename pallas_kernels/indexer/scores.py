"""Scores of one query and the keys past it, as the indexer's kernels share.

64 keys times the heads of a query is one product; its rectified, weighted sum
over heads is mapped to an integer of the same order. A thread block has two
queries, a warpgroup each, and streams the keys past both. In float8 a step
is of twice the keys, two products that take the time of one, and the sum of a
key is multiplied by its scale; a query's scale is in its weights.
Legend: S keys, H index heads, I index dim.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.ordered import NOTHING, ordered
from pallas_kernels.quantize.reference import FP8
from pallas_kernels.warpgroups import wide

BLOCK, STAGES, DIM = 64, 3, 128
_STAGE = 16 * 1024  # bytes of keys: 64 of them, or 128 in float8
TILE = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def check_heads(q: jax.Array, k: jax.Array, *, float8: bool = False) -> None:
  """Raises NotImplementedError unless the kernels can take the heads.

  Args:
    q: [... H I] queries.
    k: [... I] keys.
    float8: the kernel takes both in float8, too.
  """
  taken = (jnp.bfloat16, FP8) if float8 else (jnp.bfloat16,)
  if q.dtype != k.dtype or q.dtype not in taken:
    names = ' or both '.join(jnp.dtype(dtype).name for dtype in taken)
    raise NotImplementedError(f'dtype {q.dtype}/{k.dtype}, not {names}')
  H, I = q.shape[-2:]
  if I != DIM or H % 8 or H > 64:
    raise NotImplementedError(
      f'{H} heads of {I}, not a multiple of 8 up to 64 of {DIM}'
    )


def scratch(
  heads: int, dtype: jax.typing.DTypeLike
) -> dict[str, pl.MemoryRef | plgpu.Barrier]:
  """Returns what `score_keys` works in: two queries and a ring of keys.

  Args:
    heads: H.
    dtype: of both, bfloat16 or float8.
  """
  transforms = compat.TILED_8BIT if dtype == FP8 else compat.TILED_16BIT
  tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=transforms)
  keys = _STAGE // (DIM * jnp.dtype(dtype).itemsize)
  return {
    'qs': tile(2, heads, DIM),
    'ks': tile(STAGES, keys, DIM),
    'q_here': plgpu.Barrier(num_barriers=2),
    'here': plgpu.Barrier(num_barriers=STAGES),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  }


def scale_rows(k_scale: jax.Array | None, keys: int) -> tuple[jax.Array, ...]:
  """Returns scales [B S] as a kernel takes them: ([B keys/64 64],), or ().

  Args:
    k_scale: of keys in float8; None of others.
    keys: a multiple of 64 that they are padded to.
  """
  if k_scale is None:
    return ()
  more = ((0, 0), (0, keys - k_scale.shape[1]))
  padded = jnp.pad(k_scale.astype(jnp.float32), more)
  return (padded.reshape(k_scale.shape[0], -1, BLOCK),)


def scales_at(scales: jax.Ref, b: jax.Array) -> Callable:
  """Returns r -> the scales of row b's keys [64 r, 64 r + 64); r is clamped.

  Args:
    scales: [B S/64 64] in global memory.
    b: of the batch.
  """
  last = scales.shape[1] - 1
  return lambda r: compat.load(
    scales, (b, jnp.minimum(r, last)), BY_ROW, optimized=False
  )


def spans(
  first: jax.Ref, last: jax.Ref, b: jax.Array, pair: jax.Array, keys: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Returns the keys of this warpgroup's query, and the rows of both queries.

  Keys are first..end, rows are of 64 keys, and so many as are whole steps.

  Args:
    first, last: [B T], as of `indexer`.
    b, pair: which queries.
    keys: of a step, a multiple of 64.
  """
  g, rows = lax.axis_index('wg'), keys // BLOCK
  both = [(first[b, 2 * pair + j], last[b, 2 * pair + j]) for j in range(2)]
  start = lax.div(jnp.minimum(both[0][0], both[1][0]), keys) * rows
  end = jnp.maximum(both[0][1], both[1][1])
  end = lax.div(end + keys - 1, keys) * rows
  own = first[b, 2 * pair + g], last[b, 2 * pair + g]
  return own, (start, jnp.maximum(start, end))


def score_keys(
  k: jax.Ref, weights: jax.Array, qs: jax.Ref, ks: jax.Ref, kept: jax.Ref,
  here: jax.Ref, free: jax.Ref, *, start: jax.Array, end: jax.Array,
  span: tuple[jax.Array, jax.Array], scales: Callable | None = None,
) -> None:  # fmt: skip
  """Stores the integers of all scores: kept[r] for keys [64 r, 64 r + 64).

  From row start to end, whole steps; `scales` as of `scales_at`, in float8.
  """
  g, keys = lax.axis_index('wg'), ks.shape[1]
  rows = keys // BLOCK
  steps = lax.div(end - start, rows)

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds((start + i * rows) * BLOCK, keys)
    plgpu.copy_gmem_to_smem(k.at[where], ks.at[stage], here.at[stage])

  # Load: all stages are on their way before the first product.
  @pl.when(g == 0)
  def _():
    def fill(i: jax.Array, _) -> tuple:
      load(i, i)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  def products(tile: jax.Ref) -> jax.Array:
    def run(ref: jax.Ref) -> jax.Array:
      compat.wgmma(ref, tile, compat.transposed(qs))
      return ref[...]

    heads = qs.shape[0]
    return pl.run_scoped(run, plgpu.ACC((BLOCK, heads), jnp.float32))

  def step(i: jax.Array, carry: tuple) -> tuple:
    stage, factors = carry
    # Wait, then matmul: 64 keys by all heads of this query, once or twice.
    plgpu.barrier_wait(here.at[stage])
    tiles = [ks.at[stage, pl.ds(j * BLOCK, BLOCK)] for j in range(rows)]
    found = [jnp.maximum(products(tile), 0.0) for tile in tiles]

    # Refill: once both warpgroups have read the stage.
    @pl.when(i + STAGES < steps)
    def _():
      plgpu.barrier_arrive(free.at[stage])

      @pl.when(g == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(i + STAGES, stage)

    for j, s in enumerate(found):
      # Reduce over heads in registers: only one number a key is stored.
      total = (s * wide(weights, s.shape, 1)).sum(axis=1)
      if factors:
        total *= factors[j]
      row = start + i * rows + j
      at = place + row * BLOCK
      # A score that is nan is none, as in the reference.
      seen = (at >= span[0]) & (at < span[1]) & (total > -jnp.inf)
      kept[row] = jnp.where(seen, ordered(total), NOTHING)
    # Stages take turns; a division by three would be ten instructions.
    return jnp.where(stage == STAGES - 1, 0, stage + 1), upcoming(i + 1)

  # Once, as a maximum goes through other threads' registers.
  shape = BLOCK, qs.shape[0]
  place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE).max(axis=1)
  # A step's scales are on their way while the one before is computed.
  upcoming = lambda i: tuple(
    scales(start + i * rows + j) for j in range(rows if scales else 0)
  )
  lax.fori_loop(0, steps, step, (jnp.int32(0), upcoming(0)))


def fill(kept: jax.Ref, start: jax.Array, end: jax.Array) -> None:
  """Marks rows start to end of kept as no keys."""

  def row(r: jax.Array, _) -> tuple:
    kept[r] = compat.full((BLOCK,), NOTHING, BY_ROW, jnp.int32)
    return ()

  lax.fori_loop(start, end, row, ())
