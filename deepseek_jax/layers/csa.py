"""Compressed sparse attention, CSA (V4 section 2.3.1).

Of every m tokens (4) one entry is made, each drawing on the window before too,
and an indexer picks the `top_k` entries that a query reads. The indexer has a
smaller compressor of its own. Picked entries are gathered, k rows per query,
for a block of queries at a time; the indexer's scores alone see all entries.
What the indexer learns from is unpublished for V4. Here it is what V3.2 does:
the divergence of its softmax over the entries that are read from the
attention's to them, with detached inputs; all entries in the dense first stage.
Legend: B batch, T queries, S entries, K picked ones, D model, Q query latent,
H heads, C head dim, J index heads, I index dim.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.layers import compressor
from deepseek_jax.layers import indexer as index
from deepseek_jax.layers.compressor import (
  Compressed,
  Compressor,
  CompressorConfig,
  View,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.indexer import IndexQuery
from deepseek_jax.layers.partial_attention import Part, attend
from deepseek_jax.layers.query_blocks import over_blocks, rows
from deepseek_jax.sharding import param


@dataclasses.dataclass(frozen=True)
class CSAConfig:
  """Which entries there are and which are read.

  Attributes:
    ratio: tokens of an entry (m).
    top_k: entries that a query reads.
    index_heads, index_dim: shapes of the indexer.
    stage: 'dense' reads all entries while the indexer learns to imitate it
      (V4 begins so), 'sparse' those that the indexer picks.
    loss: weight of the indexer's loss.
    recall_queries: of a sequence in the sparse stage, on which training
      measures how much of the attention to all entries lies on the picked
      ones; 0: none.
    block: queries at a time, at most.
  """

  ratio: int = 4
  top_k: int = 512
  index_heads: int = 64
  index_dim: int = 128
  stage: Literal['dense', 'sparse'] = 'sparse'
  loss: float = 1.0
  recall_queries: int = 8
  block: int = 128

  def __post_init__(self):
    if self.recall_queries < 0:
      raise InputError(
        f'csa.recall_queries = {self.recall_queries}: must be 0 or more'
      )
    for name in ('ratio', 'top_k', 'index_heads', 'index_dim', 'block'):
      if getattr(self, name) < 1:
        raise InputError(
          f'csa.{name} = {getattr(self, name)}: must be at least 1'
        )


class CSACache(NamedTuple):
  entries: Compressed
  keys: Compressed  # the indexer's


class EntryIndexer(nnx.Module):
  """Scores entries for queries, from detached inputs."""

  def __init__(
    self,
    cfg: CSAConfig,
    compress: CompressorConfig,
    dim: int,
    latent: int,
    *,
    std,
    rngs: nnx.Rngs,
  ):
    self.cfg, self.compress = cfg, compress
    J, I = cfg.index_heads, cfg.index_dim
    init = nnx.initializers.normal(std)
    self.q = param(rngs, init, (latent, J, I), ('q_latent', 'heads', None))
    self.weights = param(rngs, init, (dim, J), ('embed', None))
    self.compressor = Compressor(compress, dim, std=std, rngs=rngs)

  def query(self, x, latent, positions) -> IndexQuery:
    """Of x [B T D] and the queries' latent [B T Q]."""
    q = jnp.einsum('BTQ,QJI->BTJI', latent, self.q[...])
    q = compressor.tail_rope(
      q, positions, self.compress.rope, self.compress.rope_dim
    )
    weight = jnp.einsum(
      'BTD,DJ->BTJ', x, self.weights[...], preferred_element_type=jnp.float32
    )
    return IndexQuery(q, weight * (q.shape[2] * q.shape[3]) ** -0.5)


class CSA(nnx.Module):
  """The entries and how queries read the picked ones."""

  def __init__(
    self,
    cfg: CSAConfig,
    compress: CompressorConfig,
    dim: int,
    latent: int,
    *,
    std,
    rngs: nnx.Rngs,
  ):
    self.cfg = cfg
    self.compressor = Compressor(compress, dim, std=std, rngs=rngs)
    keys = dataclasses.replace(compress, dim=cfg.index_dim)
    self.indexer = EntryIndexer(cfg, keys, dim, latent, std=std, rngs=rngs)

  def __call__(
    self,
    q: jax.Array,
    x: jax.Array,
    latent: jax.Array,
    ctx: Context,
    past: CSACache | None,
    *,
    scale: float,
  ) -> tuple[Part, CSACache | None, dict]:
    """Reads entries of x [B T D] by turned queries q [B T H C].

    Args:
      q, x: see above.
      latent: [B T Q], what the queries were made of.
      ctx: the tokens.
      past: entries and index keys so far.
      scale: multiplies the scores.

    Returns:
      Attention to the entries, the cache with these tokens, and in training
      {'loss': the indexer's, weighted, 'recall': the share of the attention to
      all entries that lies on the `top_k`}.
    """
    fresh = past is None or ctx.fresh
    entries, kept = self.compressor(x, ctx, past and past.entries)
    detached = jax.lax.stop_gradient((x, latent))
    keys, kept_keys = self.indexer.compressor(
      detached[0], ctx, past and past.keys
    )
    if past is not None:
      past = CSACache(kept, kept_keys)
    query = self.indexer.query(*detached, ctx.positions)
    view = compressor.view(ctx, self.cfg.ratio, fresh)
    learn = ctx.train and fresh
    args = q, query, entries, keys, scale, learn
    # With no more entries than that, all would be picked.
    if self.cfg.stage == 'dense' or entries.shape[1] <= self.cfg.top_k:
      part, stats = self._read_all(view, *args)
    else:
      part, stats = self._read(view, *args)
    if 'loss' in stats:
      stats['loss'] *= self.cfg.loss
    return part, past, stats

  def choose(self, query: IndexQuery, keys: jax.Array, view: View) -> jax.Array:
    """The entries that each query reads: [B T K] int32, -1 for none.

    Of equal scores the lowest entry wins, in prefill and decoding alike.
    """
    query, keys = jax.lax.stop_gradient((query, keys))
    S = keys.shape[1]

    def block(one):
      query, view = one
      scores = index.index_scores(query, keys)
      return index.best(scores, view.mask(S), min(self.cfg.top_k, S))

    numbers = S * self.cfg.index_heads
    return over_blocks(block, (query, view), self.cfg.block, numbers)

  def _read(self, view, q, query, entries, keys, scale, learn):
    """Each query's own entries, gathered -> (part, statistics)."""
    chosen = self.choose(query, keys, view)

    def block(one):
      q, query, at = one
      seen = at >= 0
      part, weights = attend(q, rows(entries, at), seen, scale)
      if not learn:
        return part, None
      scores = index.index_scores(query, rows(keys, at))
      return part, index.divergence(weights.mean(axis=2), scores, seen)

    numbers = chosen.shape[-1] * (entries.shape[-1] + q.shape[2])
    part, loss = over_blocks(block, (q, query, chosen), self.cfg.block, numbers)
    if not learn:
      return part, {}
    stats = {'loss': _mean(loss, view)}
    T, n = q.shape[1], self.cfg.recall_queries
    if n:
      at = np.linspace(0, T - 1, min(n, T)).astype(int)
      q, entries = jax.lax.stop_gradient((q, entries))
      q, view, chosen = jax.tree.map(lambda a: a[:, at], (q, view, chosen))
      weights = attend(q, entries, view.mask(entries.shape[1]), scale)[1]
      stats['recall'] = _mean(index.caught(weights.mean(axis=2), chosen), view)
    return part, stats

  def _read_all(self, view, q, query, entries, keys, scale, learn):
    """All entries that there are -> (part, statistics)."""
    S = entries.shape[1]
    k = min(self.cfg.top_k, S)

    def block(one):
      q, query, view = one
      seen = view.mask(S)
      part, weights = attend(q, entries, seen, scale)
      if not learn:
        return part, None
      shares, scores = weights.mean(axis=2), index.index_scores(query, keys)
      chosen = index.best(jax.lax.stop_gradient(scores), seen, k)
      caught = index.caught(jax.lax.stop_gradient(shares), chosen)
      return part, (index.divergence(shares, scores, seen), caught)

    numbers = S * max(q.shape[2], self.cfg.index_heads)
    part, stats = over_blocks(block, (q, query, view), self.cfg.block, numbers)
    if not learn:
      return part, {}
    return part, dict(zip(('loss', 'recall'), (_mean(a, view) for a in stats)))


def _mean(values: jax.Array, view: View) -> jax.Array:
  """Of [B T], over queries that see an entry, then over sequences."""
  seen = view.count > 0
  total = jnp.where(seen, values, 0).sum(axis=1)
  return (total / jnp.maximum(seen.sum(axis=1), 1)).mean()
