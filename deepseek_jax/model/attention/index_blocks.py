"""Looks for the best keys in two levels, blocks first (HISA, arXiv:2603.28458).

The lightning indexer scores every key for every query, T S / 2 of them. Here
the mean of a block's index keys stands for the block: a query scores the means
of all complete blocks before its own, and then the keys of a few blocks. The
first block of a document and the query's own, which may be incomplete, are
always among these. Blocks are counted from the start of a document. Nothing is
learnt, so weights are those of the flat indexer, and so is the choice where all
visible keys lie in so few blocks. By kernels the means are chosen as the flat
indexer chooses keys, and the keys of blocks are not gathered. Keys in float8
are read as the numbers that they are, and their means are bfloat16.
Legend: B batch, T queries, S keys, E blocks, m keys of a block, M candidates,
I index dim, K chosen keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model import cache as caching
from deepseek_jax.model.attention import index_codes, query_blocks
from deepseek_jax.model.attention.document_blocks import (
  block_starts,
  document_starts,
  new_tokens,
)
from deepseek_jax.model.attention.index_codes import Keys
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexQuery,
  best,
  index_scores,
  of_all_heads,
)
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.model.context import Context
from deepseek_jax.parallel.sequence import WHOLE, Along
from pallas_kernels.index_candidates import index_candidates
from pallas_kernels.indexer import indexer


class Blocks(NamedTuple):
  """Holds what stands for the complete blocks of keys, in order of places."""

  means: jax.Array  # [B E I]
  start: jax.Array  # [B E] int32, place of the first key; -1: no block


def _means(keys: Keys, start: jax.Array, size: int) -> jax.Array:
  """Returns means [B E I] of `size` keys of [B S I] from start [B E] on.

  They are of any keys where a block is incomplete, or starts at -1.
  """
  at = jnp.maximum(start, 0)[..., None] + jnp.arange(size)
  at = jnp.minimum(at, keys.shape[1] - 1)
  return index_codes.rows(keys, at).mean(axis=2)


def empty(
  cfg: IndexBlocksConfig, keys: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
  """Returns the means of no block for a cache of keys [B S I]: [B E I]."""
  B, S, I = keys.shape
  return jnp.zeros((B, max(1, S // cfg.size), I), keys.dtype)


def remember(
  cfg: IndexBlocksConfig, means: jax.Array, keys: Keys, ctx: Context
) -> jax.Array:
  """Returns a cache's means [B E I] with the blocks that new tokens complete.

  Args:
    cfg: sizes.
    means: before them.
    keys: [B S I], the cache's, the new ones among them.
    ctx: of the new tokens; those of a row follow one another.
  """
  T, (begin, end) = ctx.positions.shape[1], new_tokens(ctx)
  # A rewound row completes its last block anew.
  number = begin // cfg.size + jnp.arange(-(-T // cfg.size))
  start = number * cfg.size
  made = _means(keys, start, cfg.size)
  return caching.write(means, made, number, start + cfg.size <= end)


def cached(cfg: IndexBlocksConfig, means: jax.Array) -> Blocks:
  """Returns the blocks of a cache, whose rows are one document each."""
  start = jnp.arange(means.shape[1], dtype=jnp.int32) * cfg.size
  return Blocks(means, jnp.broadcast_to(start, means.shape[:2]))


def fresh(
  cfg: IndexBlocksConfig, keys: Keys, segments: jax.Array | None
) -> Blocks:
  """Returns the blocks of a batch's keys [B S I].

  Args:
    cfg: sizes.
    keys: of all tokens.
    segments: [B S] documents of the keys; None for one.
  """
  first = document_starts(segments, keys.shape[:2])
  start = block_starts(first, cfg.size, cfg.size)
  return Blocks(_means(keys, start, cfg.size), start)


def choose(
  cfg: IndexBlocksConfig,
  query: IndexQuery,
  keys: Keys,
  blocks: Blocks,
  visibility: Visibility,
  k: int,
  *,
  key_segments: jax.Array | None = None,
  most: int = 128,
  along: Along = WHOLE,
) -> jax.Array:
  """Chooses the keys that each query attends to; no gradient.

  Args:
    cfg: sizes; `count` blocks have k keys at least.
    query: of T tokens; keys: [B S I].
    blocks: of the keys.
    visibility: what the queries may attend to.
    k: how many at most.
    key_segments: [B S], where the visibility has segments.
    most: queries at a time.
    along: which heads these are.

  Returns:
    [B T k] int32, ascending, then -1 where fewer than k are visible.
  """
  query, keys, blocks = jax.lax.stop_gradient((query.wide(), keys, blocks))
  places, first = _places(visibility.places, key_segments, keys.shape[:2])

  def block(one: tuple, keys: Keys, blocks: Blocks) -> jax.Array:
    query, place, first = one
    starts = _chosen_blocks(cfg, query, blocks, place, first, along)
    at = starts[..., None] + jnp.arange(cfg.size)  # [B n count m]
    seen = (starts >= 0)[..., None] & (at <= place[..., None, None])
    at, seen = (a.reshape(*a.shape[:2], -1) for a in (at, seen))
    some = index_codes.rows(keys, jnp.where(seen, at, 0))  # [B n M I]
    scores = index_scores(query, some, along)
    # In order of places, so that of equal scores the lowest place is taken.
    found = best(scores, seen, k)
    at = jnp.take_along_axis(at, jnp.maximum(found, 0), axis=-1)
    return jnp.where(found >= 0, at, -1)

  J, I = query.q.shape[2:]
  candidates = cfg.count * cfg.size
  numbers = max(candidates * max(J, I), J * blocks.start.shape[1])
  queries = query, places, first
  return query_blocks.over_blocks(block, queries, most, numbers, (keys, blocks))


def _places(
  places: jax.Array, key_segments: jax.Array | None, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
  """Returns places [B T] among the keys, and where their documents begin."""
  first = document_starts(key_segments, shape)
  # Padding may stand beyond the last slot.
  places = jnp.clip(places, 0, shape[1] - 1)
  return places, jnp.take_along_axis(first, places, axis=1)


def choose_by_kernel(
  impl: str,
  query: IndexQuery,
  keys: Keys,
  blocks: Blocks,
  places: jax.Array,
  key_segments: jax.Array | None,
  *,
  cfg: IndexBlocksConfig,
  top_k: int,
  along: Along = WHOLE,
) -> jax.Array:
  """Computes `choose` by kernels.

  Args:
    impl: 'reference' or 'gpu', of both of them.
    query, keys, blocks, key_segments: as of `choose`.
    places: [B T] of the queries among the keys.
    cfg: sizes.
    top_k: keys of a query.
    along: the local shard; all index heads score together, so what devices
      with other heads hold is gathered.
  """
  # These kernels take bfloat16, which the numbers of float8 are, too.
  query, keys = of_all_heads(query.wide(), along), index_codes.wide(keys)
  places, first = _places(places, key_segments, keys.shape[:2])
  starts = _starts_by_kernel(impl, cfg, query, blocks, places, first)
  return index_candidates(
    *(query.q, keys, query.weight, starts, places + 1),
    size=cfg.size,
    top_k=top_k,
    impl=impl,
  )


def _starts_by_kernel(
  impl: str,
  cfg: IndexBlocksConfig,
  query: IndexQuery,
  blocks: Blocks,
  place: jax.Array,
  first: jax.Array,
) -> jax.Array:
  """Computes `_chosen_blocks` by a kernel, -1 behind the query's own.

  Args: as there, and which implementation of the kernel.
  """
  own = place - (place - first) % cfg.size
  # Complete blocks of a document before a query's own follow one another.
  start = blocks.start[:, None]
  before = lambda end: ((start >= 0) & (start < end[..., None])).sum(
    axis=-1, dtype=jnp.int32
  )
  low, high = before(first), before(own)
  # A document's first block is read by all its queries.
  number = jnp.where(low < high, low, -1)[..., None]
  others = min(cfg.count - 2, blocks.start.shape[1])
  if others:
    found = indexer(
      *(query.q, blocks.means, query.weight, low + 1, high),
      top_k=others,
      impl=impl,
    )
    number = jnp.concatenate([number, found], axis=-1)
  rows = jnp.broadcast_to(start, (*place.shape, start.shape[-1]))
  chosen = jnp.take_along_axis(rows, jnp.maximum(number, 0), axis=-1)
  chosen = jnp.where(number >= 0, chosen, -1)
  chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
  last = (number >= 0).sum(axis=-1, keepdims=True)
  here = jnp.arange(chosen.shape[-1]) == last
  return jnp.where(here, own[..., None], chosen)


def _chosen_blocks(
  cfg: IndexBlocksConfig,
  query: IndexQuery,
  blocks: Blocks,
  place: jax.Array,
  first: jax.Array,
  along: Along,
) -> jax.Array:
  """Returns the starts of the blocks whose keys a query scores.

  Args:
    cfg: sizes.
    query: of n tokens.
    blocks: of the keys.
    place: [B n] of the queries among the keys.
    first: [B n] where their documents begin.
    along: which heads these are.

  Returns:
    [B n count] int32, -1 for none; they ascend, the query's own is last.
  """
  own = place - (place - first) % cfg.size
  start = blocks.start[:, None]
  # Complete blocks of the query's document, before its own.
  seen = (start >= first[..., None]) & (start < own[..., None])
  scores = index_scores(query, blocks.means, along)
  # A document's first block is read by all its queries.
  scores = jnp.where(start == first[..., None], jnp.inf, scores)
  others = min(cfg.count - 1, blocks.start.shape[1])
  number = best(scores, seen, others)
  rows = jnp.broadcast_to(start, (*place.shape, start.shape[-1]))
  chosen = jnp.take_along_axis(rows, jnp.maximum(number, 0), axis=-1)
  chosen = jnp.where(number >= 0, chosen, -1)
  return jnp.concatenate([chosen, own[..., None]], axis=-1)
