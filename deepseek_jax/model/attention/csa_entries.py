"""Reads compressed entries, and computes what their indexer learns (V4).

XLA gathers picked entries, k rows per query, for a block of queries at a time;
a kernel needs no copy of them. The indexer's scores alone cover all (section
2.3.1). The indexer learns
the heads' mean attention to the entries, as the layer computes it: one softmax
over window, entries and sink. A head that spends 1 % on entries counts 1 %.
Legend: B batch, T queries, S entries, K picked ones, H heads, C head dim, I
index dim.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.model import kernels
from deepseek_jax.model.attention import indexer as index
from deepseek_jax.model.attention.compressor import View
from deepseek_jax.model.attention.indexer import IndexQuery
from deepseek_jax.model.attention.indexer_loss import sampled
from deepseek_jax.model.attention.partial_softmax import PartialSoftmax, attend
from deepseek_jax.model.attention.query_blocks import over_blocks, rows
from deepseek_jax.parallel.sequence import WHOLE, Along
from pallas_kernels import sparse_mla

_ALMOST_ALL = -1e-6  # log of the largest share that entries are taken to have
_LIFT = 80.0  # added to logs of shares before float32 holds them: exp(80) fits


class EntryChoice(Protocol):
  """Describes what attention to entries takes of a CSAConfig."""

  top_k: int
  stage: str
  recall_queries: int
  block: int
  measures_recall: bool


class EntryAttention(NamedTuple):
  """Holds the local queries and all entries.

  Attributes:
    cfg: which entries are read, and what is measured.
    q: [B T H C]; query: the indexer's.
    view: the entries that queries may attend to.
    entries: [B S C]; keys: [B S I], the indexer's.
    scale: multiplies the scores.
    learn: whether the indexer's loss is wanted.
    along: the local shard of sequences and heads.
    rest: [B T H] float32, log-sum-exp of what else is in the softmax: window
      and sink. Read if `learn`.
    whole: whether `rest` is of all of the softmax, entries too.
    read: whether attention is wanted, or what the indexer learns alone.
  """

  cfg: EntryChoice
  q: jax.Array
  query: IndexQuery
  view: View
  entries: jax.Array
  keys: jax.Array
  scale: float
  learn: bool = False
  along: Along = WHOLE
  rest: jax.Array | None = None
  whole: bool = False
  read: bool = True

  def seen(self) -> jax.Array | View:
    """Returns what is read: the picked entries [B T K], or all in view."""
    # With no more entries than that, all would be picked.
    dense = self.cfg.stage == 'dense' or self.entries.shape[1] <= self.cfg.top_k
    return self.view if dense else self.choose()

  def part(
    self, seen: jax.Array | View
  ) -> tuple[PartialSoftmax | None, dict[str, jax.Array]]:
    """Computes attention to the entries, and what the indexer learns from.

    Args:
      seen: from `seen`.

    Returns:
      The part if `read`, and if `learn` the indexer's 'loss' and, if measured,
      'recall': the share of the attention to all entries that lies on the
      `top_k`. Each is [B], a mean over the queries that attend to an entry.
    """
    dense = isinstance(seen, View)
    part, stats = self._all() if dense else self._chosen(seen)
    if not self.cfg.measures_recall:
      stats.pop('recall', None)
    return part, stats

  def learned(
    self, total: jax.Array, seen: jax.Array | View
  ) -> dict[str, jax.Array]:
    """Returns the statistics of `part` for entries that a kernel has read.

    Args:
      total: [B T H] float32, log-sum-exp of all of the softmax.
      seen: from `seen`.
    """
    if not self.learn:
      return {}
    q, entries = jax.lax.stop_gradient((self.q, self.entries))
    alone = self._replace(
      q=q, entries=entries, rest=total, whole=True, read=False
    )
    found = None if isinstance(seen, View) else alone._kernels_shares(seen)
    if found is None:
      return alone.part(seen)[1]
    shares, known = found
    how = {'most': self.cfg.block, 'along': self.along}
    given = self.query, self.keys, seen, shares
    loss = index.divergence_of_chosen(*given, **how)
    return alone._learned(loss, seen, known)

  def choose(self) -> jax.Array:
    """Picks the entries that each query reads: [B T K] int32, -1 for none.

    Of equal scores the lowest entry wins, in prefill and decoding alike.
    """
    query, keys = jax.lax.stop_gradient((self.query, self.keys))
    view, top_k = self.view, min(self.cfg.top_k, keys.shape[1])
    row = ('batch',)
    return kernels.pick(
      'indexer',
      lambda impl, query, keys, first, count: index.choose_within(
        impl, query, keys, (first, first + count), top_k, self.along
      ),
      lambda: self._choose(query, keys),
      (query, keys, view.first, view.count),
      (row, row, row, row),
      row,
    )

  def _choose(self, query: IndexQuery, keys: jax.Array) -> jax.Array:
    """Computes `choose` for a block of queries at a time."""
    S = keys.shape[1]

    def block(one: tuple[IndexQuery, View], keys: jax.Array) -> jax.Array:
      query, view = one
      scores = index.index_scores(query, keys, self.along)
      return index.best(scores, view.mask(S), min(self.cfg.top_k, S))

    numbers = S * query.q.shape[2]
    queries = query, self.view
    return over_blocks(block, queries, self.cfg.block, numbers, (keys,))

  def _shares(
    self, log_sum: jax.Array, weights: jax.Array, rest: jax.Array
  ) -> jax.Array:
    """Returns how all heads' attention to the entries is shared out, detached.

    Args:
      log_sum: [B T H] float32, of the scores of the entries.
      weights: [B T H S] float32, the softmax over the entries alone.
      rest: [B T H] float32, see EntryAttention.

    Returns:
      [B T S] float32: the joint softmax, added up over heads, L1-normalised.
    """
    log_sum, weights, rest = jax.lax.stop_gradient((log_sum, weights, rest))
    # The log of what entries get of 1.
    if self.whole:
      mass = jnp.minimum(log_sum - rest, 0)
    else:
      mass = -jax.nn.softplus(rest - log_sum)
    # Relative to the head that spends most: all may spend next to nothing.
    most = self.along.max_of_heads(mass.max(axis=-1, keepdims=True))
    total = jnp.einsum('BTHS,BTH->BTS', weights, jnp.exp(mass - most))
    total = self.along.sum_of_heads(total)
    return total / total.sum(axis=-1, keepdims=True)

  def _mean(
    self, values: jax.Array, view: View, weights: jax.Array | float = 1.0
  ) -> jax.Array:
    """Returns the weighted mean of values [B T] over all devices' queries: [B].

    Only queries that attend to an entry count.
    """
    counted = (view.count > 0) * weights
    # The value of a query without entries means nothing and may be NaN.
    total = jnp.where(counted > 0, values, 0) * counted
    total = total.sum(axis=1), counted.sum(axis=1)
    total, count = self.along.sum_of_parts(total)
    return total / jnp.maximum(count, 1)

  def _chosen(
    self, chosen: jax.Array
  ) -> tuple[PartialSoftmax | None, dict[str, jax.Array]]:
    """Reads each query's own entries, gathered: (part, statistics)."""

    def block(
      one: tuple, entries: jax.Array, keys: jax.Array
    ) -> tuple[PartialSoftmax | None, jax.Array | None]:
      q, query, at, rest = one
      seen = at >= 0
      part, weights = attend(q, rows(entries, at), seen, self.scale)
      if not self.learn:
        return part, None
      # The loss compares both over the picked entries alone.
      scores = index.index_scores(query, rows(keys, at), self.along)
      shares = self._shares(part.log_sum, weights, rest)
      loss = index.divergence(shares, scores, seen)
      return part if self.read else None, loss

    numbers = chosen.shape[-1] * (self.entries.shape[-1] + self.q.shape[2])
    queries = self.q, self.query, chosen, self.rest
    shared = self.entries, self.keys
    part, loss = over_blocks(block, queries, self.cfg.block, numbers, shared)
    return part, self._learned(loss, chosen) if self.learn else {}

  def _learned(
    self, loss: jax.Array, chosen: jax.Array, known: jax.Array | float = 1.0
  ) -> dict[str, jax.Array]:
    """Returns the statistics of picked entries.

    Args:
      loss: [B T].
      chosen: [B T K].
      known: [B T], of which queries the loss counts.
    """
    stats = {'loss': self._mean(loss, self.view, known)}
    if self.cfg.recall_queries:
      stats['recall'] = self._recall(chosen)
    return stats

  def _kernels_shares(
    self, chosen: jax.Array
  ) -> tuple[jax.Array, jax.Array] | None:
    """Returns `_shares` of picked entries [B T K] by a kernel, or None.

    It scores once more from the log-sum-exp of all, and gathers nothing. With
    them comes which queries have any [B T]: where every head spends less than
    1e-73 on them, float32 holds nothing of it.
    """
    rows, heads = ('batch',), ('batch', None, 'heads')

    def run(
      impl: str,
      q: jax.Array,
      entries: jax.Array,
      chosen: jax.Array,
      log_sum: jax.Array,
    ) -> jax.Array:
      keys = sparse_mla.ChosenKeys(entries, None, chosen)
      how = {'scale': self.scale, 'impl': impl}
      return sparse_mla.shares(q, None, keys, log_sum, **how)[..., None]

    found = kernels.pick(
      'attention_shares',
      run,
      lambda: None,
      (self.q, self.entries, chosen, self.rest - _LIFT),
      (heads, rows, rows, heads),
      ('batch', None, None, 'heads'),
    )
    if found is None:
      return None
    total = self.along.sum_of_heads(found.mean(axis=-1))
    mass = total.sum(axis=-1, keepdims=True)
    none = mass == 0  # of nan there is something
    return total / jnp.where(none, 1, mass), ~none[..., 0]

  def _recall(self, chosen: jax.Array) -> jax.Array:
    """Measures the recall of some queries, spread over the sequence: [B]."""
    along, T = self.along, self.q.shape[1]
    # The sampled queries of this device, and which of them count.
    at, counts = (
      jnp.asarray(a)[along.index]
      for a in sampled(T, self.cfg.recall_queries, along.ways)
    )
    some = lambda a: a[:, at]
    own = self.q, self.view, self.rest, chosen
    q, view, rest, chosen = jax.tree.map(some, own)
    q, entries = jax.lax.stop_gradient((q, self.entries))
    seen = view.mask(entries.shape[1])
    # These few attend to all entries, as in the dense stage.
    part, weights = attend(q, entries, seen, self.scale)
    if self.whole:
      # What was read has the chosen entries in it; here all of them stand.
      read, _ = attend(q, rows(entries, chosen), chosen >= 0, self.scale)
      share = jnp.exp(jnp.minimum(read.log_sum - rest, _ALMOST_ALL))
      rest = jax.lax.stop_gradient(rest + jnp.log1p(-share))
    shares = self._replace(whole=False)._shares(part.log_sum, weights, rest)
    caught = index.caught(shares, chosen)
    return self._mean(caught, view, counts)

  def _all(self) -> tuple[PartialSoftmax | None, dict[str, jax.Array]]:
    """Reads all entries that there are: (part, statistics)."""
    S = self.entries.shape[1]
    k = min(self.cfg.top_k, S)

    def block(
      one: tuple, entries: jax.Array, keys: jax.Array
    ) -> tuple[PartialSoftmax | None, tuple | None]:
      q, query, view, rest = one
      seen = view.mask(S)
      part, weights = attend(q, entries, seen, self.scale)
      if not self.learn:
        return part, None
      shares = self._shares(part.log_sum, weights, rest)
      scores = index.index_scores(query, keys, self.along)
      # What the indexer would pick, for the recall alone.
      chosen = index.best(jax.lax.stop_gradient(scores), seen, k)
      caught = index.caught(shares, chosen)
      found = index.divergence(shares, scores, seen), caught
      return part if self.read else None, found

    numbers = S * max(self.q.shape[2], self.query.q.shape[2])
    queries = self.q, self.query, self.view, self.rest
    shared = self.entries, self.keys
    part, stats = over_blocks(block, queries, self.cfg.block, numbers, shared)
    if not self.learn:
      return part, {}
    means = (self._mean(a, self.view) for a in stats)
    return part, dict(zip(('loss', 'recall'), means))
