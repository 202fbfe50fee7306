"""The indexer's choice of few queries, whose keys thread blocks share.

A thread block scores a part of the keys for two queries; with one alone per
pair, as decoding has few, most of a device would idle. Scores lie in global
memory as integers of the same order, and XLA picks the best: eight counts of
fifteen limits each find the K-th largest, four bits at a time.
Legend: B batch, T queries (even), S keys (padded), N queries of all rows, H
index heads.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.indexer import bits, scores
from pallas_kernels.indexer.scores import BLOCK, BY_COLUMN, NOTHING

_LEAST = 8  # rows of 64 keys of a part
_WORD = 32


def parts(pairs: int, rows: int) -> int:
  """Returns the thread blocks that share a pair of queries' keys.

  Args:
    pairs: of queries.
    rows: of 64 keys.
  """
  sms = compat.num_sms()
  # Two of them fit a multiprocessor.
  return 1 if 2 * pairs > sms else max(1, min(2 * sms // pairs, rows // _LEAST))


def select(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  *,
  top_k: int,
  parts: int,
) -> jax.Array:
  """Returns the choice as bits, uint32 [B T S/32], the lowest key first."""
  B, T, H, _ = q.shape
  S = k.shape[1]
  ordered = compat.kernel(
    functools.partial(_body, parts=parts),
    jax.ShapeDtypeStruct((B, T, S // BLOCK, BLOCK), jnp.int32),
    grid={'row': B, 'pair': T // 2, 'part': parts},
    threads=2,
    scratch=scores.scratch(H),
  )(q, k, w, first, last)
  words = best(ordered.reshape(B * T, S), top_k)
  return words.reshape(B, T, -1)


def _body(
  q: jax.Ref, k: jax.Ref, w: jax.Ref, first: jax.Ref, last: jax.Ref,
  ordered: jax.Ref, qs: jax.Ref, ks: jax.Ref, q_here: jax.Ref, here: jax.Ref,
  free: jax.Ref, *, parts: int,
) -> None:  # fmt: skip
  """Scores a part of the keys for a pair of queries, one a warpgroup."""
  b, pair, part, g = (lax.axis_index(a) for a in ('row', 'pair', 'part', 'wg'))
  t, rows = 2 * pair + g, ordered.shape[2]
  plgpu.copy_gmem_to_smem(q.at[b, t], qs.at[g], q_here.at[g])
  each = -(-rows // parts)
  low = part * each
  high = jnp.minimum(low + each, rows)
  span, (start, end) = scores.spans(first, last, b, pair)
  start, end = jnp.clip(start, low, high), jnp.clip(end, low, high)
  plgpu.barrier_wait(q_here.at[g])
  kept = ordered.at[b, t]
  scores.score_keys(
    k.at[b], compat.load(w, (b, t), BY_COLUMN, optimized=False),
    qs.at[g], ks, kept, here, free, start=start, end=end, span=span,
  )  # fmt: skip
  # What no query of the pair sees is no key.
  scores.fill(kept, low, start)
  scores.fill(kept, end, high)


def best(ordered: jax.Array, top_k: int) -> jax.Array:
  """Returns the top_k greatest of ordered [N S] int32 as bits [N S/32].

  Of equal ones the first are taken, and NOTHING never.
  """
  level = _level(ordered, top_k)[:, None]
  above = _words(ordered > level)
  equal = _words((ordered == level) & (level != NOTHING))
  count = lambda words: lax.population_count(words).astype(jnp.int32)
  # Of the words of equal ones those that come first, and the lowest bits of
  # the one in which there are enough.
  wanted = top_k - count(above).sum(axis=1, keepdims=True)
  each = count(equal)
  left = wanted - (jnp.cumsum(each, axis=1) - each)
  return above | _lowest(equal, left)


def _level(ordered: jax.Array, top_k: int) -> jax.Array:
  """Returns the largest integer that top_k of ordered [N S] reach: [N].

  NOTHING where fewer than top_k are more.
  """
  sign = jnp.uint32(1 << 31)
  unsigned = lax.bitcast_convert_type(ordered, jnp.uint32) ^ sign
  low = jnp.zeros(ordered.shape[0], jnp.uint32)
  for shift in range(28, -4, -4):
    limits = [low + jnp.uint32(digit << shift) for digit in range(1, 16)]
    reached = _counts([unsigned >= limit[:, None] for limit in limits])
    digits = sum((count >= top_k).astype(jnp.uint32) for count in reached)
    low += digits << shift
  return lax.bitcast_convert_type(low ^ sign, jnp.int32)


def _counts(hits: list[jax.Array]) -> tuple[jax.Array, ...]:
  """Returns how many of each of hits [N S] are true, [N] each.

  One sum of many: apart, XLA would add up the parts of each in a program of
  its own.
  """
  ones = tuple(hit.astype(jnp.int32) for hit in hits)
  add = lambda a, b: tuple(map(lax.add, a, b))
  return lax.reduce(ones, (jnp.int32(0),) * len(ones), add, (1,))


def _words(hit: jax.Array) -> jax.Array:
  """Returns hit [N S] as bits, uint32 [N S/32]."""
  place = jnp.arange(_WORD, dtype=jnp.uint32)
  ones = hit.reshape(hit.shape[0], -1, _WORD).astype(jnp.uint32)
  return (ones << place).sum(axis=-1, dtype=jnp.uint32)


def _lowest(words: jax.Array, count: jax.Array) -> jax.Array:
  """Returns words with their `count` lowest set bits alone."""
  count = jnp.maximum(count, 0)
  place = bits.place(words, count).astype(jnp.uint32)
  fewer = words & ((jnp.uint32(1) << place) - 1)
  all_ = count >= lax.population_count(words).astype(jnp.int32)
  return jnp.where(all_, words, fewer)
