"""Computes DeepSeek sparse attention (V3.2, arXiv:2512.02556, section 2.1).

Latent attention in which a query reads only the `top_k` tokens that a lightning
indexer picks, the same ones for all heads. Their latents are gathered, k rows
per query, for a block of queries at a time: no array and no product of the
heads ever has T * S entries. The indexer learns from a loss of its own, the
divergence of its softmax from the attention's head-summed one; its inputs are
detached, so it takes nothing from the model's loss and gives nothing to it.
Legend: B batch, T queries, S keys, K chosen keys, D model, H heads, C latent,
N no-rope dim, R rope dim, V value dim, I index dim.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import cache as caching
from deepseek_jax.model import kernels
from deepseek_jax.model.attention import (
  index_blocks,
  index_codes,
  indexer_loss,
  query_blocks,
  sparse_latent,
)
from deepseek_jax.model.attention import indexer as index
from deepseek_jax.model.attention.dsa_reading import (
  Read,
  read_by_kernel,
  read_chosen,
)
from deepseek_jax.model.attention.index_blocks import Blocks
from deepseek_jax.model.attention.index_codes import FP8Keys, Keys
from deepseek_jax.model.attention.indexer import (
  Indexer,
  IndexerConfig,
  IndexQuery,
)
from deepseek_jax.model.attention.indexer_loss import LossInputs
from deepseek_jax.model.attention.latent_reading import (
  FP8Latent,
  Latent,
  read_latents,
)
from deepseek_jax.model.attention.mla import MLA, MLAConfig
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.model.attention.sparse_latent import (
  PagedSparseLatent,
  SparseLatent,
)
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import gathered_attention
from deepseek_jax.parallel import sequence as context
from deepseek_jax.parallel.gathered_attention import Sequence
from deepseek_jax.parallel.sequence import WHOLE, Along

Past = SparseLatent | PagedSparseLatent


@dataclasses.dataclass(frozen=True)
class DSAConfig(MLAConfig):
  """Describes latent attention of sparse reading.

  Attributes:
    indexer: its shapes.
    top_k: tokens that a query reads.
    stage: 'dense' attends to everything while the indexer learns to imitate
      it (the warm-up), 'sparse' reads what the indexer picks.
    loss: weight of the indexer's loss. The paper leaves its reduction open:
      here the mean over a sequence's tokens, then over sequences.
    recall_queries: of a sequence in the sparse stage, on which training
      measures how much of dense attention's mass is chosen; 0: none.
    block: queries at a time, at most.
  """

  indexer: IndexerConfig = IndexerConfig()
  top_k: int = 2048
  stage: Literal['dense', 'sparse'] = 'sparse'
  loss: float = 1.0
  recall_queries: int = 8
  block: int = 128

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    super().__post_init__()
    at_least(self, top_k=1, block=1, recall_queries=0, loss=0)
    if self.indexer.dim < self.rope_dim:
      raise InputError(
        f'indexer.dim = {self.indexer.dim}: must be at least rope_dim ='
        f' {self.rope_dim}'
      )
    blocks = self.indexer.blocks
    if blocks and blocks.size * blocks.count < self.top_k:
      raise InputError(
        f'indexer.blocks.count = {blocks.count}: blocks of {blocks.size} must'
        f' hold at least top_k = {self.top_k} tokens'
      )

  @property
  def measures_recall(self) -> bool:
    """Returns whether training logs the indexer's recall."""
    return self.stage == 'dense' or self.recall_queries > 0

  def cache(
    self,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> SparseLatent:
    """Returns an empty cache: C + R numbers and an index key of I per slot.

    And the mean of index keys per block, where keys are looked for in blocks.
    A slot is a position, which a rewound row overwrites: `spare` adds none.
    """
    latents = super().cache(batch, slots, dtype, spare)
    keys = index_codes.empty((batch, slots, self.indexer.dim), dtype)
    return sparse_latent.empty(latents, keys, self.indexer.blocks)

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'DSA':
    """Returns the attention of a model of width `dim`."""
    return DSA(self, dim, std=std, rngs=rngs)


class DSA(MLA):
  """Attends to the tokens that the indexer picks, through their latents."""

  def __init__(self, cfg: DSAConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes the weights of MLA and those of the indexer."""
    super().__init__(cfg, dim, std=std, rngs=rngs)
    self.indexer = Indexer(
      cfg.indexer,
      dim,
      cfg.q_rank or dim,
      cfg.rope_dim,
      cfg.rope,
      std=std,
      rngs=rngs,
    )

  def index_key(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the indexer's keys [B T I] of x [B T D], detached from it."""
    return self.indexer.key(jax.lax.stop_gradient(x), positions)

  def index_query(self, x: jax.Array, positions: jax.Array) -> IndexQuery:
    """Returns the indexer's queries of x [B T D], detached from the model."""
    x, latent = jax.lax.stop_gradient((x, self.query_latent(x)))
    return self.indexer.query(x, latent, positions)

  def __call__(
    self, x: jax.Array, ctx: Context, past: Past | None = None
  ) -> tuple[jax.Array, Past | None, dict]:
    """Returns y [B T D], the cache with the tokens of x [B T D], statistics.

    Statistics are of training: 'loss' of the indexer (a scalar, weighted), and
    'recall', the share of dense attention's mass at its `top_k` choices.
    """
    q = self.query(x, ctx.positions)  # [B T H N], [B T H R]
    fresh = past is None or ctx.fresh
    # Later calls read latents from the cache alone, where `write` makes them.
    latent = self.latent(x, ctx.positions) if fresh else None
    key = self.index_key(x, ctx.positions)
    query = self.index_query(x, ctx.positions)
    # With a cache in float8 a first call chooses as later ones do.
    if past is not None and isinstance(past.index, FP8Keys):
      key, query = FP8Keys(*index_codes.encoded(key)), query.encoded()
    if past is not None:
      past = self.extended(past, x, latent, key, ctx)
    # Later calls attend to the cache; a first one to its tokens alone.
    if not fresh:
      return self.project(self.cached(q, query, past, ctx)), past, {}
    y, stats = self.fresh(q, query, SparseLatent(*latent, key), ctx)
    return self.project(y), past, stats

  def extended(
    self,
    past: Past,
    x: jax.Array,
    latent: Latent | None,
    key: Keys,
    ctx: Context,
  ) -> Past:
    """Returns the cache with what is cached of x [B T D].

    Args:
      past: the cache.
      x: [B T D].
      latent: of x, or None if not needed otherwise.
      key: [B T I] of the indexer, in the cache's format.
      ctx: of these tokens.
    """
    paged = isinstance(past, PagedSparseLatent)
    held = self.write(x, ctx, latent, past.latents)
    put = lambda b, n: caching.write(b, n, ctx.positions, ctx.valid)
    past = past._replace(
      index=jax.tree.map(put, past.index, key),
      **({'latents': held} if paged else held._asdict()),
    )
    if past.means is None:
      return past
    means = index_blocks.remember(
      self.cfg.indexer.blocks, past.means, past.index, ctx
    )
    return past._replace(means=means)

  def dense(self, keys: int) -> bool:
    """Returns whether queries read all, as they would choose all of so few."""
    return self.cfg.stage == 'dense' or keys <= self.cfg.top_k

  def cached(
    self,
    q: tuple[jax.Array, jax.Array],
    query: IndexQuery,
    past: Past,
    ctx: Context,
  ) -> jax.Array:
    """Attends to what queries choose of a cache: [B T H V]."""
    if self.dense(past.index.shape[1]):
      return self.attend(*q, None, past.latents, ctx)
    visibility = query_blocks.visibility(
      ctx.positions, ctx.segments, fresh=False
    )
    documents = visibility.segments
    blocks = self.cfg.indexer.blocks
    if blocks:
      blocks = index_blocks.cached(blocks, past.means)
    chosen = choose(
      self.cfg, query, past.index, visibility, documents, blocks=blocks
    )
    if isinstance(past, SparseLatent):
      keys = past.latents
      return read(self.cfg, q, keys, self.ups(), chosen, shares=False).y
    # What is chosen lies anywhere in the pages: one row's keys to queries of
    # any row. A place that is none is read as the first one, of the page that
    # is nobody's and zero.
    keys, chosen = past.one_row(chosen, ctx.valid)
    alone = tuple(a.reshape(1, -1, *a.shape[2:]) for a in q)
    y = read(self.cfg, alone, keys, self.ups(), chosen, shares=False).y
    return y.reshape(*q[0].shape[:3], -1)

  def fresh(
    self,
    q: tuple[jax.Array, jax.Array],
    query: IndexQuery,
    new: SparseLatent,
    ctx: Context,
  ) -> tuple[jax.Array, dict]:
    """Attends within a batch without a cache.

    Returns:
      [B T H V], and in training the statistics of `__call__`.
    """
    (B, T, H, _), cfg = q[0].shape, self.cfg
    if self.dense(T) and not ctx.train:
      return self.attend(*q, Latent(*new[:2]), None, ctx), {}
    body = _dense if self.dense(T) else _sparse
    rows, heads = ('batch', 'seq'), ('batch', 'seq', 'heads')
    names = 'loss', 'recall'
    if not self.dense(T) and not cfg.recall_queries:
      names = ('loss',)
    out = heads, {name: ('batch',) for name in names if ctx.train}
    # Each device computes its queries and heads; index heads are sharded as
    # well, so both must divide.
    y, stats = context.split(
      functools.partial(body, cfg, ctx.train),
      (q, query, new, ctx.segments, self.kv_up[...]),
      (heads, heads, rows, rows, (None, 'heads')),
      out,
      batch=B,
      seq=T,
      heads=math.gcd(H, cfg.indexer.heads),
    )
    stats = {name: values.mean() for name, values in stats.items()}
    if 'loss' in stats:
      stats['loss'] *= cfg.loss
    return y, stats


def choose(
  cfg: DSAConfig,
  query: IndexQuery,
  keys: Keys,
  visibility: Visibility,
  key_segments: jax.Array | None = None,
  along: Along = WHOLE,
  blocks: Blocks | None = None,
) -> jax.Array:
  """Chooses the `top_k` keys [B S I] that each query reads: [B T K] int32.

  Args:
    cfg: see there.
    query, keys, visibility, key_segments, along: as of `index.choose`.
    blocks: of the keys, where they are looked for in blocks and a cache has
      them.
  """
  levels = cfg.indexer.blocks
  how = {'key_segments': key_segments, 'most': cfg.block, 'along': along}
  # In few keys all blocks would be chosen.
  if levels and keys.shape[1] > levels.size * levels.count:
    if blocks is None:
      blocks = index_blocks.fresh(levels, keys, key_segments)
    own = lambda: index_blocks.choose(
      levels, query, keys, blocks, visibility, cfg.top_k, **how
    )
    return kernels.pick(
      'index_candidates',
      functools.partial(
        index_blocks.choose_by_kernel, cfg=levels, top_k=cfg.top_k, along=along
      ),
      own,
      (query, keys, blocks, visibility.places, key_segments),
      (('batch',),) * 5,
      ('batch',),
    )
  own = lambda: index.choose(query, keys, visibility, cfg.top_k, **how)
  return kernels.pick(
    'indexer',
    functools.partial(index.choose_by_kernel, top_k=cfg.top_k, along=along),
    own,
    (query, keys, visibility.places, key_segments),
    (('batch',),) * 4,
    ('batch',),
  )


def read(
  cfg: DSAConfig,
  q: tuple[jax.Array, jax.Array],
  keys: Latent | FP8Latent,
  ups: tuple[jax.Array, jax.Array],
  chosen: jax.Array,
  *,
  shares: bool,
) -> Read:
  """Attends to the chosen; with the `shares` that the loss wants, or not."""
  args, most = (q, keys, ups, chosen), cfg.block
  row, heads = ('batch',), ('batch', None, 'heads')
  own = lambda: read_chosen(*args, scale=cfg.scale, most=most)
  found = kernels.pick(
    'sparse_mla',
    functools.partial(read_by_kernel, scale=cfg.scale, shares=shares),
    own,
    args,
    (heads, row, (None, 'heads'), row),
    (heads, ('batch', None, None, 'heads'))[: 1 + shares],
  )
  if isinstance(found, Read):
    return found
  # Each device's shares are the mean over its heads.
  return Read(found[0], found[1].mean(-1) if shares else None)


def _loss_inputs(
  cfg: DSAConfig,
  along: Along,
  q: tuple[jax.Array, jax.Array],
  query: IndexQuery,
  new: SparseLatent,
  segments: jax.Array | None,
  up: jax.Array,
) -> LossInputs:
  """Gathers latents and index keys: what local queries attend to of all.

  Args:
    cfg: see there.
    along: the local shard.
    q: [B T H N] and [B T H R].
    query: the indexer's.
    new: what is cached of the local tokens.
    segments: [B T], or None.
    up: [C H N+V].
  """
  seen = gathered_attention.sequence(along, q[0].shape[1], segments)
  places = seen.first + jnp.arange(q[0].shape[1])
  visibility = Visibility(jnp.broadcast_to(places, q[0].shape[:2]), segments)
  keys, k_up = along.gather(new), up[..., : cfg.nope_dim]
  return LossInputs(
    q,
    keys[:2],
    k_up,
    query,
    keys.index,
    visibility,
    seen.keys,
    cfg.scale,
    along,
  )


def _dense(
  cfg: DSAConfig,
  train: bool,
  along: Along,
  q: tuple[jax.Array, jax.Array],
  query: IndexQuery,
  new: SparseLatent,
  segments: jax.Array | None,
  up: jax.Array,
) -> tuple[jax.Array, dict]:
  """Attends to all tokens: (y, the indexer's loss and recall).

  Args: as of `_loss_inputs`, and whether the batch is for training.
  """
  del train  # or this would be MLA's
  inputs = _loss_inputs(cfg, along, q, query, new, segments, up)
  seen = Sequence(inputs.visibility.places[0, 0], segments, inputs.segments)
  q, latents = jnp.concatenate(q, axis=-1), Latent(*inputs.latents)
  y = read_latents(along, q, latents, up, seen, cfg.scale)
  k, chosen = min(cfg.top_k, inputs.keys.shape[1]), None
  if cfg.indexer.blocks and k == cfg.top_k:
    # Of what the sparse stage would choose, recall is measured.
    where = inputs.visibility, inputs.segments, along
    chosen = choose(cfg, query, inputs.keys, *where)
  return y, indexer_loss.over_all(inputs, k, cfg.block, chosen)


def _sparse(
  cfg: DSAConfig,
  train: bool,
  along: Along,
  q: tuple[jax.Array, jax.Array],
  query: IndexQuery,
  new: SparseLatent,
  segments: jax.Array | None,
  up: jax.Array,
) -> tuple[jax.Array, dict]:
  """Attends to the chosen tokens: (y, the indexer's loss and recall).

  Args: as of `_loss_inputs`, and whether the batch is for training.
  """
  inputs = _loss_inputs(cfg, along, q, query, new, segments, up)
  ups = jnp.split(up, [cfg.nope_dim], axis=-1)
  where = inputs.visibility, inputs.segments, along
  chosen = choose(cfg, query, inputs.keys, *where)
  found = read(cfg, q, Latent(*inputs.latents), ups, chosen, shares=train)
  if not train:
    return found.y, {}
  # The indexer's target is the mean of all heads, on whatever device.
  shares = along.mean_of_heads(jax.lax.stop_gradient(found.shares))
  stats = indexer_loss.over_chosen(inputs, chosen, shares, cfg.block)
  if cfg.recall_queries:
    stats['recall'] = indexer_loss.recall(inputs, chosen, cfg.recall_queries)
  return found.y, stats
