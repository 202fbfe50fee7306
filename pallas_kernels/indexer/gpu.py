"""The indexer's choice on Hopper: scores stay in shared memory.

A thread block takes two queries of one row at a time, a warpgroup each, and
streams the keys past both. 64 keys times the heads of a query is one product;
its rectified, weighted sum over heads is mapped to an integer of the same
order and kept. Then 32 counts find the K-th largest, bit by bit; among equals
further counts find the position up to which they are taken; and what leaves is
one bit per key, 1/32 of the scores.

Many keys don't fit: then the integers of a thread block lie in global memory,
which takes no more than [thread blocks, 2, S] and stays in the L2 cache. Few
queries share the keys among thread blocks instead (shared_keys).
Legend: B batch, T queries, S keys, H index heads, I index dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.indexer import bits, scores, shared_keys
from pallas_kernels.indexer.scores import (
  BLOCK,
  BY_COLUMN,
  BY_ROW,
  TILE,
  check_heads,
)
from pallas_kernels.ordered import NOTHING

CHUNK = 64  # rows of 64 keys that are counted at once
NEAR = 4 * CHUNK * BLOCK  # keys of two queries that fit shared memory


def indexer(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  top_k: int,
  k_scale: jax.Array | None = None,
  near: int | None = None,
) -> jax.Array:
  """Returns positions [B T K] int32 of the top_k best scores."""
  _supported(q, k)
  B, T = q.shape[:2]
  S = k.shape[1]
  pairs = -(-T // 2)
  rows = -(-S // (CHUNK * BLOCK)) * CHUNK
  if near is None:
    # jax 0.10 finds no layout for rows that are stored one by one and read 64
    # at a time from shared memory.
    near = 0 if compat.BEFORE_0_11 else NEAR
  # An odd last query goes twice.
  even = lambda a: jnp.pad(
    a, ((0, 0), (0, 2 * pairs - T)) + ((0, 0),) * (a.ndim - 2), 'edge'
  )
  args = (
    even(q),
    jnp.pad(k, ((0, 0), (0, rows * BLOCK - S), (0, 0))),
    even(w).astype(jnp.float32),
    even(first),
    even(last),
    *scores.scale_rows(k_scale, rows * BLOCK),
  )
  parts = shared_keys.parts(B * pairs, rows)
  if parts > 1:
    words = shared_keys.select(*args, top_k=top_k, parts=parts)
  else:
    words = _select(*args, top_k=top_k, near=near)
    words = lax.bitcast_convert_type(words.swapaxes(2, 3), jnp.uint32)
  chosen = bits.positions(words.reshape(B * 2 * pairs, -1), top_k)
  return chosen.reshape(B, 2 * pairs, top_k)[:, :T]


def _supported(q: jax.Array, k: jax.Array) -> None:
  """Raises NotImplementedError unless the kernel can take the shapes."""
  check_heads(q, k, float8=True)
  if k.shape[1] > 2**20:
    raise NotImplementedError(f'{k.shape[1]} keys, more than {2**20}')


def _select(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  *scales: jax.Array,
  top_k: int,
  near: int,
) -> jax.Array:
  """Returns the choice as bits, int32 [B T 2 S/64].

  Bit i of word [h, r] stands for key 64 r + 32 h + i. `scales` [B S/64 64] are
  those of keys in float8, else there are none.
  """
  B, T, H, _ = q.shape
  S = k.shape[1]
  rows, items = S // BLOCK, B * T // 2
  workers = min(items, compat.num_sms())
  words = jax.ShapeDtypeStruct((B, T, 2, rows), jnp.int32)
  kept = jax.ShapeDtypeStruct((workers, 2, rows, BLOCK), jnp.int32)
  is_near = near >= S
  scratch = {
    **scores.scratch(H, q.dtype),
    'words': plgpu.SMEM((2, 2, CHUNK), jnp.int32),
    'counts': plgpu.SMEM((2, CHUNK), jnp.int32),
    'done': plgpu.Barrier(num_arrivals=2),
  }
  if is_near:
    scratch['kept'] = plgpu.SMEM(kept.shape[1:], jnp.int32)
  out = compat.kernel(
    functools.partial(_body, items=items, top_k=top_k, near=is_near),
    words if is_near else (words, kept),
    grid={'worker': workers},
    threads=2,
    scratch=list(scratch.values()),
  )(q, k, w, first, last, *scales)
  return out if is_near else out[0]


def _body(
  q: jax.Ref, k: jax.Ref, w: jax.Ref, first: jax.Ref, last: jax.Ref,
  *rest: jax.Ref, items: int, top_k: int, near: bool,
) -> None:  # fmt: skip
  """Chooses for pairs of queries, one a warpgroup, until none is left.

  `rest` are the scales of keys in float8, what goes out, and scratch.
  """
  worker, g = lax.axis_index('worker'), lax.axis_index('wg')
  if near:
    *rest, kept = rest
    kept = kept.at[g]
  *rest, qs, ks, q_here, here, free, words, counts, done = rest
  if not near:
    *rest, kept = rest
    kept = kept.at[worker, g]
  *scales, out = rest
  workers = min(items, compat.num_sms())
  per_row = q.shape[1] // 2

  def item(i: jax.Array, _) -> tuple:
    # The last queries have the most keys: they go first.
    number = items - 1 - (worker + i * workers)
    b, pair = lax.div(number, per_row), lax.rem(number, per_row)
    t = 2 * pair + g
    # Load: a query a warpgroup; the keys that either may choose, for both.
    plgpu.copy_gmem_to_smem(q.at[b, t], qs.at[g], q_here.at[g])
    span, (start, end) = scores.spans(first, last, b, pair, ks.shape[1])
    # Scores: one pass over the keys, as integers into `kept`.
    plgpu.barrier_wait(q_here.at[g])
    scores.score_keys(
      k.at[b], compat.load(w, (b, t), BY_COLUMN, optimized=False),
      qs.at[g], ks, kept, here, free, start=start, end=end, span=span,
      scales=scores.scales_at(*scales, b) if scales else None,
    )  # fmt: skip
    # The ring is refilled for the next item when both have read it.
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    # Selection reads whole chunks: rows without scores are no keys.
    chunks = lax.div(start, CHUNK), lax.div(end + CHUNK - 1, CHUNK)
    scores.fill(kept, chunks[0] * CHUNK, start)
    scores.fill(kept, end, chunks[1] * CHUNK)
    plgpu.commit_smem()  # the other threads of the warpgroup read it
    # Select: the limit by counting, then a bit for every key.
    limits = _threshold(kept, counts.at[g], chunks, top_k, k.shape[1])
    _emit(kept, words.at[g], out.at[b, t], chunks, limits)
    return ()

  mine = lax.div(items - worker + workers - 1, workers)
  lax.fori_loop(0, mine, item, ())


def _read(kept: jax.Ref, chunk: jax.Array) -> jax.Array:
  """Loads 64 rows of kept, 64 keys each."""
  rows = pl.ds(chunk * CHUNK, CHUNK)
  return compat.load(kept, rows, TILE, optimized=False)


def _count(
  kept: jax.Ref,
  counts: jax.Ref,
  chunks: tuple[jax.Array, jax.Array],
  holds: Callable,
) -> jax.Array:
  """Returns how many keys have holds(integers, chunk)."""

  def add(chunk: jax.Array, total: jax.Array) -> jax.Array:
    hit = holds(_read(kept, chunk), chunk)
    return total + hit.astype(jnp.int32)

  zero = compat.full((CHUNK, BLOCK), 0, TILE, jnp.int32)
  # A sum across warps goes through shared memory that Mosaic sets aside once,
  # for both warpgroups. So rows first, and of those every warp sums all.
  counts[...] = lax.fori_loop(*chunks, add, zero).sum(axis=1)
  plgpu.commit_smem()
  return compat.load(counts, slice(None), BY_COLUMN).sum()


def _positions(chunk: jax.Array) -> jax.Array:
  """Returns the positions of a chunk's keys, int32 [64 64]."""
  iota = lambda axis: plgpu.broadcasted_iota(
    jnp.int32, (CHUNK, BLOCK), axis, layout=TILE
  )
  return (chunk * CHUNK + iota(0)) * BLOCK + iota(1)


def _threshold(
  kept: jax.Ref,
  counts: jax.Ref,
  chunks: tuple[jax.Array, jax.Array],
  top_k: int,
  keys: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns (level, place), the limit of the choice.

  A key is chosen if its integer is above level, or equal to it at a position
  before place.
  """
  count = functools.partial(_count, kept, counts, chunks)

  def bit(i: jax.Array, low: jax.Array) -> jax.Array:
    # From -2**31 up: adding 2**31 to it wraps to 0, as it should.
    next_ = low + lax.shift_left(jnp.int32(1), 31 - i)
    enough = count(lambda x, _: x >= next_) >= top_k
    return jnp.where(enough, next_, low)

  # Level: the largest integer that at least top_k keys reach.
  level = lax.fori_loop(0, 32, bit, jnp.int32(NOTHING))
  above = count(lambda x, _: x > level)
  equal = count(lambda x, _: x == level)
  wanted = top_k - above
  most = keys.bit_length()
  # All of them, as a rule: then nothing is searched.
  passes = jnp.where((equal <= wanted) | (level == NOTHING), 0, most)

  def step(i: jax.Array, place: jax.Array) -> jax.Array:
    further = place + lax.shift_left(jnp.int32(1), most - 1 - i)

    def before(x: jax.Array, chunk: jax.Array) -> jax.Array:
      return (x == level) & (_positions(chunk) < further)

    few = count(before) <= wanted
    return jnp.where(few, further, place)

  place = lax.fori_loop(0, passes, step, jnp.int32(0))
  return level, jnp.where(passes == 0, jnp.int32(2**30), place)


def _emit(
  kept: jax.Ref,
  words: jax.Ref,
  out: jax.Ref,
  chunks: tuple[jax.Array, jax.Array],
  limits: tuple[jax.Array, jax.Array],
) -> None:
  """Writes the words of every chunk of this query."""
  level, place = limits

  def chunk(c: jax.Array, _) -> tuple:
    inside = (c >= chunks[0]) & (c < chunks[1])

    @pl.when(inside)
    def _():
      x = _read(kept, c)
      tie = (x == level) & (_positions(c) < place)
      chosen = ((x > level) | tie) & (x != NOTHING)
      # Pack: a sum of different powers of two is the union of their bits.
      column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=TILE)
      bit = lax.shift_left(jnp.ones_like(x), column & 31)
      for half in range(2):
        own = chosen & ((column >= 32) if half else (column < 32))
        words[half] = jnp.where(own, bit, 0).sum(axis=1)

    @pl.when(jnp.logical_not(inside))
    def _():
      for half in range(2):
        words[half] = compat.full((CHUNK,), 0, BY_ROW, jnp.int32)

    plgpu.commit_smem()
    # Store: the words of this chunk, both halves of 32 columns.
    for half in range(2):
      where = pl.ds(c * CHUNK, CHUNK)
      plgpu.copy_smem_to_gmem(words.at[half], out.at[half, where])
    plgpu.wait_smem_to_gmem(0)
    return ()

  lax.fori_loop(0, out.shape[1] // CHUNK, chunk, ())
