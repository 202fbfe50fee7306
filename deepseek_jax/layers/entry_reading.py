"""How queries read compressed entries, and what their indexer learns (V4).

Picked entries are gathered, k rows per query, for a block of queries at a time;
the indexer's scores alone see all entries (section 2.3.1).
Legend: B batch, T queries, S entries, K picked ones, H heads, C head dim, I
index dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers import indexer as index
from deepseek_jax.layers.compressor import View
from deepseek_jax.layers.indexer import IndexQuery
from deepseek_jax.layers.partial_attention import Part, attend
from deepseek_jax.layers.query_blocks import over_blocks, rows
from deepseek_jax.parallel.context import WHOLE, Along


class Reading(NamedTuple):
  """Own queries and all entries.

  Attributes:
    top_k: entries that a query reads; block: queries at a time, at most.
    q: [B T H C]; query: the indexer's.
    view: the entries that queries see.
    entries: [B S C]; keys: [B S I], the indexer's.
    scale: multiplies the scores.
    learn: whether the indexer's loss is wanted.
    along: which part of sequences and heads this is.
  """

  top_k: int
  block: int
  q: jax.Array
  query: IndexQuery
  view: View
  entries: jax.Array
  keys: jax.Array
  scale: float
  learn: bool = False
  along: Along = WHOLE

  def part(self) -> tuple[Part, jax.Array]:
    """Attention to the entries, and the indexer's loss [B T] or 0."""
    if self.entries.shape[1] <= self.top_k:  # all would be picked
      return self._all()
    return self._chosen(self.choose())

  def choose(self) -> jax.Array:
    """The entries that each query reads: [B T K] int32, -1 for none.

    Of equal scores the lowest entry wins, in prefill and decoding alike.
    """
    query, keys = jax.lax.stop_gradient((self.query, self.keys))
    S = keys.shape[1]

    def block(one):
      query, view = one
      scores = index.index_scores(query, keys, self.along)
      return index.best(scores, view.mask(S), min(self.top_k, S))

    numbers = S * query.q.shape[2]
    return over_blocks(block, (query, self.view), self.block, numbers)

  def _loss(self, query, keys, seen, weights):
    if not self.learn:
      return jnp.zeros(seen.shape[:2])
    scores = index.index_scores(query, keys, self.along)
    shares = self.along.mean_of_heads(
      jax.lax.stop_gradient(weights).mean(axis=2)
    )
    return index.divergence(shares, scores, seen)

  def _chosen(self, chosen):
    """Each query's own entries, gathered."""

    def block(one):
      q, query, at = one
      seen = at >= 0
      part, weights = attend(q, rows(self.entries, at), seen, self.scale)
      return part, self._loss(query, rows(self.keys, at), seen, weights)

    numbers = chosen.shape[-1] * (self.entries.shape[-1] + self.q.shape[2])
    queries = self.q, self.query, chosen
    return over_blocks(block, queries, self.block, numbers)

  def _all(self):
    """All entries, where there are no more than would be picked."""
    S = self.entries.shape[1]

    def block(one):
      q, query, view = one
      seen = view.mask(S)
      part, weights = attend(q, self.entries, seen, self.scale)
      return part, self._loss(query, self.keys, seen, weights)

    numbers = S * max(self.q.shape[2], self.query.q.shape[2])
    queries = self.q, self.query, self.view
    return over_blocks(block, queries, self.block, numbers)
