"""Compressed sparse attention, CSA (V4 section 2.3.1).

Of every m tokens (4) one entry is made, each drawing on the window before too,
and an indexer picks the `top_k` entries that a query reads. The indexer has a
smaller compressor of its own. Picked entries are gathered, k rows per query,
for a block of queries at a time; the indexer's scores alone see all entries.
What the indexer learns from is unpublished for V4. Here it is what V3.2 does:
the divergence of its softmax over the picked entries from the attention's, with
detached inputs. A `top_k` of at least all entries is the dense first stage.
Legend: B batch, T queries, S entries, K picked ones, D model, Q query latent,
H heads, C head dim, J index heads, I index dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    loss: weight of the indexer's loss.
    block: queries at a time, at most.
  """

  ratio: int = 4
  top_k: int = 512
  index_heads: int = 64
  index_dim: int = 128
  loss: float = 1.0
  block: int = 128

  def __post_init__(self):
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
      {'loss': the indexer's, weighted}.
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
    if entries.shape[1] <= self.cfg.top_k:  # all would be picked
      part, loss = self._read_all(q, query, view, entries, keys, scale, learn)
    else:
      chosen = self.choose(query, keys, view)
      part, loss = self._read(q, query, chosen, entries, keys, scale, learn)
    if not learn:
      return part, past, {}
    seen = view.count > 0
    loss = jnp.where(seen, loss, 0).sum() / jnp.maximum(seen.sum(), 1)
    return part, past, {'loss': self.cfg.loss * loss}

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

  def _read(self, q, query, chosen, entries, keys, scale, learn):
    """Each query's own entries, gathered."""

    def block(one):
      q, query, at = one
      seen = at >= 0
      part, weights = attend(q, rows(entries, at), seen, scale)
      if not learn:
        return part, jnp.zeros(seen.shape[:2])
      scores = index.index_scores(query, rows(keys, at))
      return part, index.divergence(weights.mean(axis=2), scores, seen)

    numbers = chosen.shape[-1] * (entries.shape[-1] + q.shape[2])
    return over_blocks(block, (q, query, chosen), self.cfg.block, numbers)

  def _read_all(self, q, query, view, entries, keys, scale, learn):
    """All entries, where there are no more than would be picked."""
    S = entries.shape[1]

    def block(one):
      q, query, view = one
      seen = view.mask(S)
      part, weights = attend(q, entries, seen, scale)
      if not learn:
        return part, jnp.zeros(seen.shape[:2])
      scores = index.index_scores(query, keys)
      return part, index.divergence(weights.mean(axis=2), scores, seen)

    numbers = S * max(q.shape[2], self.cfg.index_heads)
    return over_blocks(block, (q, query, view), self.cfg.block, numbers)
