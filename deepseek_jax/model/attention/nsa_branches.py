"""Computes each branch of native sparse attention (arXiv:2502.11089).

Pure functions of queries and keys that lie in one place; `cfg` is an NSAConfig.
Legend: B batch, T queries, S keys, H heads, G groups, J = H / G, K query/key
dim, V value dim, E compressed entries, N selected blocks, M gathered tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model import kernels, lookup
from deepseek_jax.model.attention import query_blocks
from deepseek_jax.model.attention.indexer import best
from deepseek_jax.parallel import products
from deepseek_jax.parallel.masking import MASKED
from pallas_kernels.sparse_gqa import sparse_gqa

CMP, SLC, WIN = range(3)  # the branches, in this order in all weights


class Entries(NamedTuple):
  """Holds compressed blocks."""

  k: jax.Array  # [B E G K]
  v: jax.Array  # [B E G V]
  start: jax.Array  # [B E] int32, place of the first token; -1: no entry


class Queries(NamedTuple):
  """Holds a block of queries and their places."""

  q: jax.Array  # [B T G J K]
  place: jax.Array  # [B T] int32, the query's own among the keys
  first: jax.Array  # [B T] int32, where its document begins
  gates: jax.Array  # [B T G J 3] float32


def overlaps(cfg: Any) -> np.ndarray:
  """Counts the strides that a selected block shares with the entries about it.

  For blocks of 64 and entries of 32 every 16: 1, 2, 2, 2, 1, from the entry
  that begins a stride before the block (equation 9, whose printed index holds
  when it counts from 1).
  """
  a, b = cfg.select_block // cfg.stride, cfg.block // cfg.stride
  m = np.arange(a + b - 1)
  return np.minimum(np.minimum(m + 1, a + b - 1 - m), min(a, b))


def masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
  """Computes a softmax over the last axis; all 0 where nothing is visible."""
  p = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
  return jnp.where(seen, p, 0)


def seen_entries(one: Queries, entries: Entries, cfg: Any) -> jax.Array:
  """Returns which entries each query attends to, [B T E] bool."""
  start, end = entries.start[:, None], entries.start[:, None] + cfg.block - 1
  # Entries of the query's document that end at or before its place.
  seen = (start >= 0) & (start >= one.first[..., None])
  return seen & (end <= one.place[..., None])


def compressed_branch(
  one: Queries, entries: Entries, cfg: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B T G J V] and attention [B T G J E] float32."""
  seen = seen_entries(one, entries, cfg)
  scores = jnp.einsum(
    'BTGJK,BEGK->BTGJE', one.q, entries.k, preferred_element_type=jnp.float32
  )
  p = masked_softmax(scores * cfg.scale, seen[:, :, None, None])
  return jnp.einsum(
    'BTGJE,BEGV->BTGJV', p.astype(entries.v.dtype), entries.v
  ), p


def select(
  one: Queries, p: jax.Array, entries: Entries, keys: int, cfg: Any
) -> jax.Array:
  """Selects the blocks that each group reads.

  Args:
    one: the queries; p: their attention to the entries [B T G J E].
    entries: what p is of.
    keys: tokens that there are; bounds the number of blocks.
    cfg: sizes.

  Returns:
    [B T G N] int32 numbers of blocks within the query's document; -1: none.
  """
  B, T, G = p.shape[:3]
  blocks = -(-keys // cfg.select_block)
  shares = jax.lax.stop_gradient(p).sum(axis=3)  # [B T G E]
  weights = overlaps(cfg)
  # The number of the first entry of the query's document. Entries of other
  # documents have no attention, so reading beyond its own adds nothing.
  before = (entries.start[:, None] < one.first[..., None]) & (
    entries.start[:, None] >= 0
  )
  strides = np.arange(blocks)[:, None] * (cfg.select_block // cfg.stride)
  near = strides - (cfg.block // cfg.stride - 1) + np.arange(len(weights))
  at = before.sum(axis=-1)[..., None, None] + near  # [B T blocks m]
  inside = (at >= 0) & (at < shares.shape[-1])
  at = jnp.where(inside, at, 0).reshape(B, T, 1, -1)
  found = jnp.take_along_axis(
    shares, jnp.broadcast_to(at, (B, T, G, at.shape[-1])), axis=-1
  ).reshape(B, T, G, blocks, -1)
  scores = jnp.where(inside[:, :, None], found * weights, 0).sum(axis=-1)
  own = (one.place - one.first)[..., None, None] // cfg.select_block
  number = jnp.arange(blocks)
  always = (number < cfg.initial) | (
    (number <= own) & (number > own - cfg.local)
  )
  scores = jnp.where(always, 1e30, scores)
  seen = jnp.broadcast_to(number <= own, scores.shape)
  flat = lambda a: a.reshape(B, T * G, blocks)
  chosen = best(flat(scores), flat(seen), min(cfg.select, blocks))
  return chosen.reshape(B, T, G, -1)


def gathered_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array, scale: float
) -> jax.Array:
  """Attends from each query to rows of its own.

  Args:
    q: [B T G J K]; k: [B S G K]; v: [B S G V].
    at: [B T G M] int32 rows; -1 is none.
    scale: multiplies the scores.

  Returns:
    [B T G J V].
  """
  # A padded query may stand beyond the last slot.
  pick = lambda keys, rows: lookup.rows(keys, rows, 'clip')
  over_groups = jax.vmap(pick, (1, 1), 1)  # [S G .], [T G M] -> [T G M .]
  take = lambda keys: jax.vmap(over_groups)(keys, jnp.maximum(at, 0))
  scores = jnp.einsum(
    'BTGJK,BTGMK->BTGJM', q, take(k), preferred_element_type=jnp.float32
  )
  p = masked_softmax(scores * scale, (at >= 0)[:, :, :, None])
  return products.einsum('BTGJM,BTGMV->BTGJV', p.astype(v.dtype), take(v))


def selected_rows(one: Queries, chosen: jax.Array, cfg: Any) -> jax.Array:
  """Returns tokens of the chosen blocks up to the query, [B T G M]."""
  begin = one.first[..., None, None] + chosen * cfg.select_block
  rows = begin[..., None] + jnp.arange(cfg.select_block)
  seen = (chosen >= 0)[..., None] & (rows <= one.place[..., None, None, None])
  return jnp.where(seen, rows, -1).reshape(*chosen.shape[:3], -1)


def window_rows(one: Queries, groups: int, cfg: Any) -> jax.Array:
  """Returns the last `window` tokens of the document, [B T G window]."""
  rows = one.place[..., None] - jnp.arange(cfg.window)
  rows = jnp.where(rows >= one.first[..., None], rows, -1)[:, :, None]
  return jnp.broadcast_to(rows, (*rows.shape[:2], groups, cfg.window))


class Keys(NamedTuple):
  """Holds tokens of one branch."""

  k: jax.Array  # [B S G K]
  v: jax.Array  # [B S G V]
  begin: jax.Array | int = 0  # place of the first of them


def keys_of(branch: int, k: jax.Array, v: jax.Array) -> Keys:
  """Returns one branch of k [B S 3 G K] and v [B S 3 G V]."""
  return Keys(k[:, :, branch], v[:, :, branch])


def attend(
  queries: Queries,
  selected: Keys,
  window: Keys,
  entries: Entries,
  cfg: Any,
) -> jax.Array:
  """Computes all branches, gated and added.

  Args:
    queries: T of them.
    selected: all tokens of the second branch.
    window: of the third, at least what the queries' windows hold.
    entries: the compressed branch.
    cfg: sizes.

  Returns:
    [B T G J V].
  """
  row, heads = ('batch',), ('batch', None, 'heads')
  found = kernels.pick(
    'sparse_gqa',
    functools.partial(_by_kernel, cfg=cfg, begin=window.begin),
    lambda: None,
    (*queries, *selected[:2], *window[:2], *entries),
    (heads, row, row, heads, *(heads,) * 6, row),
    heads,
  )
  if found is not None:
    return found
  S, G = selected.k.shape[1:3]

  def block(
    one: Queries, selected: Keys, window: Keys, entries: Entries
  ) -> jax.Array:
    def read(keys: Keys, at: jax.Array) -> jax.Array:
      at = jnp.where(at >= 0, at - keys.begin, -1)
      return gathered_attention(one.q, keys.k, keys.v, at, cfg.scale)

    far, p = compressed_branch(one, entries, cfg)
    chosen = select(one, p, entries, S, cfg)
    near = read(selected, selected_rows(one, chosen, cfg))
    last = read(window, window_rows(one, G, cfg))
    return _gated(one, far, near, last)

  gathered = cfg.select * cfg.select_block + cfg.window
  numbers = G * gathered * (cfg.qk_dim + cfg.v_dim)
  numbers += cfg.heads * entries.k.shape[1]
  shared = selected, window, entries
  return query_blocks.over_blocks(block, queries, cfg.queries, numbers, shared)


def _gated(one: Queries, *branches: jax.Array) -> jax.Array:
  """Returns the branches [B T G J V] under their gates, added."""
  # Gates are float32, and so is the sum of what they let through.
  total = sum(y * one.gates[..., i, None] for i, y in enumerate(branches))
  return total.astype(branches[0].dtype)


def _by_kernel(
  impl: str, *arrays: jax.Array, cfg: Any, begin: jax.Array | int
) -> jax.Array:
  """Computes `attend` by the kernel that gathers each query's rows.

  Args:
    impl: 'reference' or 'gpu'.
    *arrays: of queries, selected, window and entries.
    cfg: sizes.
    begin: place of the window's first key.
  """
  queries = Queries(*arrays[:4])
  selected, window = Keys(*arrays[4:6]), Keys(*arrays[6:8], begin)
  entries = Entries(*arrays[8:])
  (S, G), E = selected.k.shape[1:3], entries.k.shape[1]

  def block(
    one: Queries, selected: Keys, window: Keys, entries: Entries
  ) -> jax.Array:
    def read(k: jax.Array, v: jax.Array, at: jax.Array) -> jax.Array:
      return sparse_gqa(one.q, k, v, at, scale=cfg.scale, impl=impl)

    # What selects blocks is scored by XLA, without gradient.
    _, p = compressed_branch(jax.lax.stop_gradient(one), entries, cfg)
    rows = selected_rows(one, select(one, p, entries, S, cfg), cfg)
    seen = seen_entries(one, entries, cfg)
    all_seen = jnp.where(seen, jnp.arange(E), -1)[:, :, None]
    all_seen = jnp.broadcast_to(all_seen, (*seen.shape[:2], G, E))
    last = window_rows(one, G, cfg)
    last = jnp.where(last >= 0, last - window.begin, -1)
    return _gated(
      one,
      read(entries.k, entries.v, all_seen),
      read(selected.k, selected.v, rows),
      read(window.k, window.v, last),
    )

  numbers = G * (cfg.select * cfg.select_block + cfg.window + E)
  numbers += cfg.heads * E  # scores of entries, which select blocks
  shared = selected, window, entries
  most = queries.q.shape[1]
  return query_blocks.over_blocks(block, queries, most, numbers, shared)
