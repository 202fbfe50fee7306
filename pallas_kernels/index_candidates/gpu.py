"""The choice among the keys of blocks on Hopper: no copy of them is stored.

A thread block scores candidates of one query, 64 at a time: their keys times
the heads is one product, and the rectified, weighted sum over heads one integer
of the same order. A block begins at any key, and TMA's tiles at every eighth:
so keys are fetched by cp.async (see gather), two tiles in flight, in four
thread blocks of a multiprocessor. Few queries, as decoding has, share their
candidates among thread blocks. XLA picks the best of the integers, by counts,
for as many queries at a time as the L2 cache holds.
Legend: B batch, T queries, N queries of all rows, S keys, H index heads,
I index dim, R runs of a query, which are blocks or 64 keys of one, K chosen.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.indexer import bits
from pallas_kernels.indexer.scores import (
  BLOCK,
  BY_COLUMN,
  BY_ROW,
  DIM,
  TILE,
  check_heads,
)
from pallas_kernels.ordered import NOTHING, ordered
from pallas_kernels.warpgroups import wide

STAGES = 2
_RESIDENT = 4  # thread blocks of a multiprocessor
_LEAST = 4  # tiles of a thread block, where several share a query
_AT_ONCE = 2**23  # integers: 32 MiB of 50 of the L2 cache


def index_candidates(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  starts: jax.Array,
  last: jax.Array,
  size: int,
  top_k: int,
) -> jax.Array:
  """Returns positions [B T K] int32 of the top_k best scores."""
  run = min(size, BLOCK)
  _supported(q, k, size, run)
  B, T = q.shape[:2]
  flat = lambda a: a.reshape(B * T, *a.shape[2:])
  runs = _runs(flat(starts), flat(last), size, run, k.shape[1])
  row = jnp.repeat(jnp.arange(B, dtype=jnp.int32), T)
  queries = flat(q), flat(w).astype(jnp.float32), runs, row
  choose = functools.partial(_choose, k=k, run=run, top_k=top_k)
  count = -(-runs.first.size * run // _AT_ONCE)
  if count == 1:
    return choose(queries).reshape(B, T, top_k)
  each = -(-B * T // count)

  def split(a: jax.Array) -> jax.Array:
    # What fills the last part up has no candidate: low and high are 0.
    more = [(0, each * count - B * T)] + [(0, 0)] * (a.ndim - 1)
    return jnp.pad(a, more).reshape(count, each, *a.shape[1:])

  chosen = lax.map(choose, jax.tree.map(split, queries))
  return chosen.reshape(-1, top_k)[: B * T].reshape(B, T, top_k)


def _supported(q: jax.Array, k: jax.Array, size: int, run: int) -> None:
  """Raises NotImplementedError unless the kernel can take the shapes."""
  check_heads(q, k)
  if run % 8 or BLOCK % run or size % run:
    raise NotImplementedError(
      f'blocks of {size} keys, not of 8, 16, 32 or a multiple of {BLOCK}'
    )
  if k.shape[1] < run:
    raise NotImplementedError(f'{k.shape[1]} keys, fewer than {run}')


class _Runs(NamedTuple):
  """Lists runs of keys that fill tiles of 64, all [N R] int32.

  Attributes:
    first: where a run is copied from, among the keys of its row, wholly.
    low, high: which of its keys are candidates that the query may choose.
  """

  first: jax.Array
  low: jax.Array
  high: jax.Array


def _runs(
  starts: jax.Array, last: jax.Array, size: int, run: int, keys: int
) -> _Runs:
  """Returns the runs of blocks that begin at starts [N blocks]."""
  parts = jnp.arange(0, size, run, dtype=jnp.int32)
  at = jnp.where(starts >= 0, starts, -size)[..., None] + parts
  at = at.reshape(starts.shape[0], -1)
  more = -at.shape[1] % (BLOCK // run)
  at = jnp.pad(at, ((0, 0), (0, more)), constant_values=-1)
  # Of a run past the last key those before it are copied in its place.
  first = jnp.clip(at, 0, keys - run)
  high = jnp.where(at >= 0, jnp.clip(last[:, None] - first, 0, run), 0)
  return _Runs(first, jnp.maximum(at - first, 0), high)


def _choose(
  queries: tuple[jax.Array, ...], k: jax.Array, run: int, top_k: int
) -> jax.Array:
  """Returns the choice [N K] of some queries.

  Args:
    queries: q [N H I], w [N H], runs [N R], row of the batch [N].
    k: [B S I].
    run: keys of a run.
    top_k: K.
  """
  q, w, runs, row = queries
  (N, R), (_, S, I) = runs.first.shape, k.shape
  tiles = R * run // BLOCK
  real = runs.low < runs.high
  at = jnp.where(real, runs.first + row[:, None] * S, -1)
  # The tiles behind the last candidate are skipped.
  used = jnp.where(real, jnp.arange(1, R + 1, dtype=jnp.int32), 0)
  steps = -(-used.max(axis=1) * run // BLOCK)
  parts = _parts(N, tiles)
  tile = functools.partial(
    plgpu.SMEM, dtype=jnp.bfloat16, transforms=gather.TILE
  )
  integers = compat.kernel(
    functools.partial(_body, run=run, parts=parts),
    jax.ShapeDtypeStruct((N, tiles, BLOCK), jnp.int32),
    # Queries last: all axes but that one end at 65,535.
    grid={'part': parts, 'query': N},
    scratch=[
      tile((q.shape[1], DIM)),
      tile((STAGES, BLOCK, DIM)),
      plgpu.Barrier(),
    ],
  )(q, k.reshape(-1, I), w, at, runs.low, runs.high, steps)
  words = bits.best(integers.reshape(N, tiles * BLOCK), top_k)
  found = bits.positions(words, top_k)
  where = jnp.maximum(found, 0)
  first = jnp.take_along_axis(runs.first, where // run, axis=1)
  return jnp.where(found >= 0, first + where % run, -1)


def _parts(queries: int, tiles: int) -> int:
  """Returns the thread blocks that share a query's tiles: fill the device."""
  room = _RESIDENT * compat.num_sms()
  return max(1, min(room // queries, tiles // _LEAST))


def _body(
  q: jax.Ref, k: jax.Ref, w: jax.Ref, at: jax.Ref, lows: jax.Ref,
  highs: jax.Ref, steps: jax.Ref, out: jax.Ref, qs: jax.Ref, ks: jax.Ref,
  q_here: jax.Ref, *, run: int, parts: int,
) -> None:  # fmt: skip
  """Scores a part of the tiles of one query."""
  n, part = lax.axis_index('query'), lax.axis_index('part')
  heads, tiles, runs = qs.shape[0], out.shape[1], BLOCK // run
  each = -(-tiles // parts)
  start = part * each
  stop = jnp.minimum(start + each, tiles)
  end = jnp.clip(steps[n], start, stop)

  def fetch(tile: jax.Array) -> None:
    @pl.when(tile < end)
    def _():
      chosen = at.at[n, pl.ds(tile * runs, runs)]
      gather.start(k, chosen, ks.at[lax.rem(tile - start, STAGES)], run)

    gather.commit()

  # Load: the query stays, all stages are on their way.
  plgpu.copy_gmem_to_smem(q.at[n], qs, q_here)
  lax.fori_loop(start, start + STAGES, lambda tile, _: fetch(tile), None)
  weights = compat.load(w, n, BY_COLUMN, optimized=False)
  plgpu.barrier_wait(q_here)

  def step(tile: jax.Array, _: None) -> None:
    def products(ref: jax.Ref) -> jax.Array:
      keys = ks.at[lax.rem(tile - start, STAGES)]
      compat.wgmma(ref, keys, compat.transposed(qs))
      return ref[...]

    # Wait, then matmul: 64 keys by all heads.
    gather.wait(STAGES - 1)
    plgpu.commit_smem()
    s = pl.run_scoped(products, plgpu.ACC((BLOCK, heads), jnp.float32))
    # Refill: every warp is done reading the stage.
    plgpu.commit_smem()
    fetch(tile + STAGES)
    # Reduce over heads in registers: only one number a key is stored.
    s = jnp.maximum(s, 0.0)
    total = (s * wide(weights, s.shape, 1)).sum(axis=1)
    place = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=TILE)
    place = place.max(axis=1)
    seen = place < 0
    for i in range(runs):
      low, high = (a[n, tile * runs + i] + i * run for a in (lows, highs))
      seen |= (place >= low) & (place < high)
    # A score that is nan is none, as in the reference.
    seen &= total > -jnp.inf
    out[n, tile] = jnp.where(seen, ordered(total), NOTHING)

  lax.fori_loop(start, end, step, None)

  # What has no candidate is no key.
  def fill(tile: jax.Array, _: None) -> None:
    out[n, tile] = compat.full((BLOCK,), NOTHING, BY_ROW, jnp.int32)

  lax.fori_loop(end, stop, fill, None)
