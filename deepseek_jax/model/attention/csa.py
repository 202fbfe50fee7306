"""Computes compressed sparse attention, CSA (DeepSeek-V4 section 2.3.1).

Of every m tokens (4) one entry is made, each drawing on the window before too,
and an indexer picks the `top_k` entries that a query reads. The indexer has a
smaller compressor of its own. Picked entries are gathered, k rows per query,
for a block of queries at a time; the indexer's scores alone cover all entries.
What the indexer learns from is unpublished for V4. Here it is what V3.2 does:
the divergence of its softmax over the entries that are read from the
attention's to them, with detached inputs; all entries in the dense first stage.
A head counts by the probability that it spends on entries beside its window and
sink, for that is its attention to them (see EntryAttention).
Legend: B batch, T queries, S entries, K picked ones, D model, Q query latent,
H heads, C head dim, J index heads, I index dim.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import at_least
from deepseek_jax.model.attention import compressor
from deepseek_jax.model.attention.compressor import (
  Compressed,
  Compressor,
  CompressorConfig,
)
from deepseek_jax.model.attention.csa_entries import EntryAttention
from deepseek_jax.model.attention.indexer import IndexQuery
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import products
from deepseek_jax.parallel.sequence import Along
from deepseek_jax.parallel.sharding import param


@dataclasses.dataclass(frozen=True)
class CSAConfig:
  """Describes which entries there are and which are read.

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

  @property
  def measures_recall(self) -> bool:
    """Returns whether training logs the indexer's recall."""
    return self.stage == 'dense' or self.recall_queries > 0

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'csa.', ratio=1, top_k=1, index_heads=1, index_dim=1)
    at_least(self, 'csa.', block=1, recall_queries=0, loss=0)


class CSACache(NamedTuple):
  """Holds the entries, and the indexer's keys of the same windows."""

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
    std: float,
    rngs: nnx.Rngs,
  ):
    """Makes the indexer's projections and its compressor.

    Args:
      cfg: shapes of the indexer.
      compress: how index keys are made of tokens.
      dim: D.
      latent: Q.
      std: of the weights.
      rngs: random streams of `params`.
    """
    self.cfg, self.compress = cfg, compress
    J, I = cfg.index_heads, cfg.index_dim
    init = nnx.initializers.normal(std)
    self.q = param(rngs, init, (latent, J, I), ('q_latent', 'heads', None))
    self.weights = param(rngs, init, (dim, J), ('embed', None))
    self.compressor = Compressor(compress, dim, std=std, rngs=rngs)

  def query(
    self, x: jax.Array, latent: jax.Array, positions: jax.Array
  ) -> IndexQuery:
    """Returns index queries of x [B T D] and the queries' latent [B T Q]."""
    q = products.einsum('BTQ,QJI->BTJI', latent, self.q[...])
    q = compressor.tail_rope(
      q, positions, self.compress.rope, self.compress.rope_dim
    )
    # Each index head's weight comes from the token itself, [B T J].
    weight = jnp.einsum(
      'BTD,DJ->BTJ', x, self.weights[...], preferred_element_type=jnp.float32
    )
    return IndexQuery(q, weight * (q.shape[2] * q.shape[3]) ** -0.5)


class CSA(nnx.Module):
  """Makes the entries and lets queries read the picked ones."""

  def __init__(
    self,
    cfg: CSAConfig,
    compress: CompressorConfig,
    dim: int,
    latent: int,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    """Makes the compressor of entries and the indexer with its own.

    Args:
      cfg: see there.
      compress: how entries are made of tokens.
      dim: D.
      latent: Q.
      std: of the weights.
      rngs: random streams of `params`.
    """
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
    past: CSACache,
    *,
    scale: float,
  ) -> tuple[EntryAttention, CSACache]:
    """Gives the entries of the cache and x [B T D] to queries q [B T H C].

    Args:
      q, x: see above.
      latent: [B T Q], what the queries were made of.
      ctx: the tokens.
      past: entries and index keys so far.
      scale: multiplies the scores.

    Returns:
      What is read of the entries, and the cache with these tokens.
    """
    # Entries [B S C] and, from the smaller compressor, keys [B S I].
    entries, kept = self.compressor(x, ctx, past.entries)
    keys, kept_keys = self.indexer.compressor(x, ctx, past.keys)
    query = self.indexer.query(x, latent, ctx.positions)
    view = compressor.view(ctx, self.cfg.ratio, ctx.fresh)
    # The indexer picks, and each query attends to its own picks.
    far = EntryAttention(self.cfg, q, query, view, entries, keys, scale)
    return far, CSACache(kept, kept_keys)

  def inputs(
    self, x: jax.Array, latent: jax.Array, ctx: Context
  ) -> tuple[tuple, IndexQuery, tuple]:
    """Returns the inputs of `fresh` for an uncached batch.

    Args:
      x: [B T D].
      latent: [B T Q], what the queries were made of.
      ctx: the tokens.

    Returns:
      The compressors' inputs, the index query, and the compressors' weights.
    """
    # The indexer takes no gradient from the model and gives it none.
    detached = jax.lax.stop_gradient((x, latent))
    makers = self.compressor, self.indexer.compressor
    tokens = makers[0].tokens(x, ctx), makers[1].tokens(detached[0], ctx)
    query = self.indexer.query(*detached, ctx.positions)
    return tokens, query, tuple(maker.weights() for maker in makers)


def fresh(
  cfg: CSAConfig,
  compress: tuple[CompressorConfig, CompressorConfig],
  along: Along,
  q: jax.Array,
  tokens: tuple,
  query: IndexQuery,
  weights: tuple,
  *,
  scale: float,
  learn: bool,
) -> EntryAttention:
  """Gives the entries of all to the local queries.

  Args:
    cfg: what is read; compress: how entries and index keys are made.
    along: the local shard.
    q: [B T H C].
    tokens, query, weights: see CSA.inputs.
    scale: multiplies the scores.
    learn: whether the indexer's loss is wanted.
  """
  # Each device compresses its tokens; entries and keys are gathered.
  entries, keys = (
    compressor.fresh_entries(*one, q.dtype, along)
    for one in zip(compress, weights, tokens)
  )
  where = tokens[0].positions, tokens[0].segments
  view = compressor.fresh_view(*where, cfg.ratio, along)
  return EntryAttention(cfg, q, query, view, entries, keys, scale, learn, along)
