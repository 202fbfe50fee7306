"""Scores of one query and the keys past it, as the indexer's kernels share.

64 keys times the heads of a query is one product; its rectified, weighted sum
over heads is mapped to an integer of the same order. A thread block has two
queries, a warpgroup each, and streams the keys past both.
Legend: S keys, H index heads, I index dim.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.ordered import NOTHING, ordered
from pallas_kernels.warpgroups import wide

BLOCK, STAGES, DIM = 64, 3, 128
TILE = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def check_heads(q: jax.Array, k: jax.Array) -> None:
  """Raises NotImplementedError unless the kernels can take the heads.

  Args:
    q: [... H I] queries.
    k: [... I] keys.
  """
  if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
    raise NotImplementedError(f'dtype {q.dtype}/{k.dtype}, not bfloat16')
  H, I = q.shape[-2:]
  if I != DIM or H % 8 or H > 64:
    raise NotImplementedError(
      f'{H} heads of {I}, not a multiple of 8 up to 64 of {DIM}'
    )


def scratch(heads: int) -> dict[str, pl.MemoryRef | plgpu.Barrier]:
  """Returns what `score_keys` works in: two queries and a ring of keys."""
  tile = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  return {
    'qs': tile(2, heads, DIM),
    'ks': tile(STAGES, BLOCK, DIM),
    'q_here': plgpu.Barrier(num_barriers=2),
    'here': plgpu.Barrier(num_barriers=STAGES),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  }


def spans(
  first: jax.Ref, last: jax.Ref, b: jax.Array, pair: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Returns the keys of this warpgroup's query, and the rows of both queries.

  Keys are first..end, rows are of 64 keys.
  """
  g = lax.axis_index('wg')
  both = [(first[b, 2 * pair + j], last[b, 2 * pair + j]) for j in range(2)]
  start = lax.div(jnp.minimum(both[0][0], both[1][0]), BLOCK)
  end = lax.div(jnp.maximum(both[0][1], both[1][1]) + BLOCK - 1, BLOCK)
  own = first[b, 2 * pair + g], last[b, 2 * pair + g]
  return own, (start, jnp.maximum(start, end))


def score_keys(
  k: jax.Ref, weights: jax.Array, qs: jax.Ref, ks: jax.Ref, kept: jax.Ref,
  here: jax.Ref, free: jax.Ref, *, start: jax.Array, end: jax.Array,
  span: tuple[jax.Array, jax.Array],
) -> None:  # fmt: skip
  """Stores the integers of all scores: kept[r] for keys [64 r, 64 r + 64)."""
  g, steps = lax.axis_index('wg'), end - start

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds((start + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(k.at[where], ks.at[stage], here.at[stage])

  # Load: all stages are on their way before the first product.
  @pl.when(g == 0)
  def _():
    def fill(i: jax.Array, _) -> tuple:
      load(i, i)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  def products(stage: jax.Array) -> jax.Array:
    def run(ref: jax.Ref) -> jax.Array:
      compat.wgmma(ref, ks.at[stage], compat.transposed(qs))
      return ref[...]

    heads = qs.shape[0]
    return pl.run_scoped(run, plgpu.ACC((BLOCK, heads), jnp.float32))

  def step(i: jax.Array, stage: jax.Array) -> jax.Array:
    # Wait, then matmul: 64 keys by all heads of this query.
    plgpu.barrier_wait(here.at[stage])
    s = jnp.maximum(products(stage), 0.0)

    # Refill: once both warpgroups have read the stage.
    @pl.when(i + STAGES < steps)
    def _():
      plgpu.barrier_arrive(free.at[stage])

      @pl.when(g == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(i + STAGES, stage)

    # Reduce over heads in registers: only one number a key is stored.
    total = (s * wide(weights, s.shape, 1)).sum(axis=1)
    at = place + (start + i) * BLOCK
    # A score that is nan is none, as in the reference.
    seen = (at >= span[0]) & (at < span[1]) & (total > -jnp.inf)
    kept[start + i] = jnp.where(seen, ordered(total), NOTHING)
    # Stages take turns; a division by three would be ten instructions.
    return jnp.where(stage == STAGES - 1, 0, stage + 1)

  # Once, as a maximum goes through other threads' registers.
  shape = BLOCK, qs.shape[0]
  place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE).max(axis=1)
  lax.fori_loop(0, steps, step, jnp.int32(0))


def fill(kept: jax.Ref, start: jax.Array, end: jax.Array) -> None:
  """Marks rows start to end of kept as no keys."""

  def row(r: jax.Array, _) -> tuple:
    kept[r] = compat.full((BLOCK,), NOTHING, BY_ROW, jnp.int32)
    return ()

  lax.fori_loop(start, end, row, ())
