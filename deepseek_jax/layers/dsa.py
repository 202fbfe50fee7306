"""DeepSeek sparse attention (V3.2, arXiv:2512.02556, section 2.1).

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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import cache as caching
from deepseek_jax import kernels
from deepseek_jax.errors import InputError
from deepseek_jax.layers import indexer as index
from deepseek_jax.layers import query_blocks
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.indexer import Indexer, IndexerConfig, IndexQuery
from deepseek_jax.layers.mla import MLA, Latent, MLAConfig
from deepseek_jax.layers.query_blocks import Sight
from pallas_kernels.indexer import indexer
from pallas_kernels.mla_prefill import segment_starts
from pallas_kernels.sparse_mla import sparse_mla

_NEG = -1e30


@dataclasses.dataclass(frozen=True)
class DSAConfig(MLAConfig):
  """Latent attention of sparse reading.

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
    super().__post_init__()
    for name in ('top_k', 'block'):
      if getattr(self, name) < 1:
        raise InputError(f'{name} = {getattr(self, name)}: must be at least 1')
    if self.recall_queries < 0:
      raise InputError(
        f'recall_queries = {self.recall_queries}: must be 0 or more'
      )
    if self.indexer.dim < self.rope_dim:
      raise InputError(
        f'indexer.dim = {self.indexer.dim}: must be at least rope_dim ='
        f' {self.rope_dim}'
      )

  @property
  def measures_recall(self) -> bool:
    """Whether training reports it."""
    return self.stage == 'dense' or self.recall_queries > 0

  def cache(self, batch: int, slots: int, dtype) -> 'SparseLatent':
    """An empty cache: C + R numbers and an index key of I per slot."""
    latent = super().cache(batch, slots, dtype)
    shape = (batch, slots, self.indexer.dim)
    return SparseLatent(*latent, jnp.zeros(shape, dtype))

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'DSA':
    return DSA(self, dim, std=std, rngs=rngs)


class SparseLatent(NamedTuple):
  """All that the layer remembers of a token; also its cache."""

  c: jax.Array  # [B S C], normed
  kr: jax.Array  # [B S R], turned
  index: jax.Array  # [B S I], normed and turned


class Read(NamedTuple):
  """What reading the chosen tokens gives."""

  y: jax.Array  # [B T H V]
  shares: jax.Array | None  # [B T K] float32: the heads' mean attention


def read_chosen(
  queries: tuple[jax.Array, jax.Array],
  keys: tuple[jax.Array, jax.Array],
  ups: tuple[jax.Array, jax.Array],
  chosen: jax.Array,
  *,
  scale: float,
  most: int = 128,
) -> Read:
  """Attention of each query to its own few latents (absorbed form).

  Args:
    queries: no-rope [B T H N] and turned rope part [B T H R].
    keys: latents [B S C] and turned rope keys [B S R].
    ups: what makes of a latent keys [C H N] and values [C H V].
    chosen: [B T K] int32, rows of the keys; -1 is none.
    scale: multiplies the scores.
    most: queries at a time.
  """
  k_up, v_up = ups
  f32 = {'preferred_element_type': jnp.float32}

  def block(one):
    qn, qr, at = one
    c, kr = (query_blocks.rows(a, at) for a in keys)  # [B n K .]
    qc = jnp.einsum('BTHN,CHN->BTHC', qn, k_up)
    scores = jnp.einsum('BTHC,BTKC->BTHK', qc, c, **f32)
    scores += jnp.einsum('BTHR,BTKR->BTHK', qr, kr, **f32)
    scores = jnp.where(at[:, :, None] >= 0, scores * scale, _NEG)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum('BTHK,BTKC->BTHC', weights.astype(c.dtype), c)
    y = jnp.einsum('BTHC,CHV->BTHV', mixed, v_up)
    return Read(y, weights.mean(axis=2))

  C, H, _ = k_up.shape
  numbers = chosen.shape[-1] * (C + H)
  return query_blocks.over_blocks(block, (*queries, chosen), most, numbers)


def choose_by_kernel(query: IndexQuery, keys, sight: Sight, k: int, impl):
  """`index.choose` in ascending order, without its scores in memory."""
  first = jnp.zeros_like(sight.places)
  if sight.segments is not None:
    first = segment_starts(sight.segments)
  span = first, sight.places + 1
  return indexer(query.q, keys, query.weight, *span, top_k=k, impl=impl)


def read_by_kernel(queries, keys, ups, chosen, *, scale: float, impl) -> Read:
  """`read_chosen` without the shares."""
  qc = jnp.einsum('BTHN,CHN->BTHC', queries[0], ups[0])
  mixed = sparse_mla(qc, queries[1], *keys, chosen, scale=scale, impl=impl)
  return Read(jnp.einsum('BTHC,CHV->BTHV', mixed, ups[1]), None)


def dense_shares(q, k, seen, scale: float) -> jax.Array:
  """The heads' mean attention of q [B T H K] to k [B S H K] -> [B T S]."""
  scores = jnp.einsum(
    'BTHK,BSHK->BHTS', q, k, preferred_element_type=jnp.float32
  )
  scores = jnp.where(seen[:, None], scores * scale, _NEG)
  return jax.nn.softmax(scores, axis=-1).mean(axis=1)


class Scene(NamedTuple):
  """A fresh batch as the indexer's loss sees it; only `index` has gradients."""

  q: jax.Array  # [B T H N+R]
  k: jax.Array  # [B S H N+R]
  index: IndexQuery
  keys: jax.Array  # [B S I]
  sight: Sight
  segments: jax.Array | None  # [B S]

  def mean(self, values: jax.Array) -> jax.Array:
    """Of [B T], over tokens that are no padding, then over sequences."""
    if self.segments is None:
      return values.mean()
    valid = self.segments > 0
    total = jnp.where(valid, values, 0).sum(axis=1)
    return (total / jnp.maximum(valid.sum(axis=1), 1)).mean()


def dense_statistics(scene: Scene, cfg: DSAConfig) -> dict[str, jax.Array]:
  """The warm-up's loss over all keys, and the recall at `top_k`."""
  S = scene.k.shape[1]
  k = min(cfg.top_k, S)

  def block(one):
    q, query, sight = one
    seen = sight.mask(jnp.arange(S), scene.segments)
    shares = dense_shares(q, scene.k, seen, cfg.scale)
    scores = index.index_scores(query, scene.keys)
    chosen = index.best(jax.lax.stop_gradient(scores), seen, k)
    loss = index.divergence(shares, scores, seen)
    return loss, index.caught(shares, chosen)

  numbers = S * max(cfg.heads, cfg.indexer.heads)
  loss, recall = query_blocks.over_blocks(
    block, (scene.q, scene.index, scene.sight), cfg.block, numbers
  )
  return {'loss': cfg.loss * scene.mean(loss), 'recall': scene.mean(recall)}


def sparse_statistics(
  scene: Scene, cfg: DSAConfig, chosen: jax.Array, shares: jax.Array
) -> dict[str, jax.Array]:
  """The loss over the chosen keys, and the recall of some queries.

  Args:
    scene, cfg: what is attended.
    chosen: [B T K]; shares: [B T K], the attention's means over heads.
  """

  def block(one):
    query, at, shares = one
    scores = index.index_scores(query, query_blocks.rows(scene.keys, at))
    return index.divergence(shares, scores, at >= 0)

  numbers = chosen.shape[-1] * max(cfg.indexer.heads, cfg.indexer.dim)
  loss = query_blocks.over_blocks(
    block, (scene.index, chosen, shares), cfg.block, numbers
  )
  out = {'loss': cfg.loss * scene.mean(loss)}
  T = chosen.shape[1]
  if cfg.recall_queries:
    at = np.linspace(0, T - 1, min(cfg.recall_queries, T)).astype(int)
    some = lambda a: a[:, at]
    q, sight, chosen = jax.tree.map(some, (scene.q, scene.sight, chosen))
    seen = sight.mask(jnp.arange(scene.k.shape[1]), scene.segments)
    shares = dense_shares(q, scene.k, seen, cfg.scale)
    recall = index.caught(shares, chosen)
    if scene.segments is not None:
      scene = scene._replace(segments=some(scene.segments))
    out['recall'] = scene.mean(recall)
  return out


class DSA(MLA):
  """Latent attention to the tokens that the indexer picks."""

  def __init__(self, cfg: DSAConfig, dim: int, *, std, rngs: nnx.Rngs):
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

  def remember(self, x: jax.Array, positions: jax.Array) -> SparseLatent:
    """What is cached of x [B T D]."""
    key = self.indexer.key(jax.lax.stop_gradient(x), positions)
    return SparseLatent(*self.latent(x, positions), key)

  def index_query(self, x: jax.Array, positions: jax.Array) -> IndexQuery:
    """The indexer's queries of x [B T D], detached from the model."""
    x, latent = jax.lax.stop_gradient((x, self.query_latent(x)))
    return self.indexer.query(x, latent, positions)

  def __call__(
    self, x: jax.Array, ctx: Context, past: SparseLatent | None = None
  ) -> tuple[jax.Array, SparseLatent | None, dict]:
    """x [B T D] -> (y [B T D], cache with these tokens, statistics).

    Statistics are of training: 'loss' of the indexer (a scalar, weighted), and
    'recall', the share of dense attention's mass at its `top_k` choices.
    """
    q = self.query(x, ctx.positions)
    new = self.remember(x, ctx.positions)
    if past is not None:
      write = lambda b, n: caching.write(b, n, ctx.positions, ctx.valid)
      past = SparseLatent(*map(write, past, new))
    fresh = past is None or ctx.fresh
    keys = new if fresh else past
    # With no more keys than that, choosing would choose all of them.
    if self.cfg.stage == 'dense' or keys.c.shape[1] <= self.cfg.top_k:
      latents = [Latent(*a[:2]) if a is not None else a for a in (new, past)]
      y = self.attend(*q, *latents, ctx)
      statistics = dense_statistics
    else:
      chosen, read = self.read(x, q, keys, ctx, fresh)
      y = read.y
      statistics = lambda scene, cfg: sparse_statistics(
        scene, cfg, chosen, read.shares
      )
    if not (ctx.train and fresh):
      return self.project(y), past, {}
    stats = statistics(self.scene(x, q, new, ctx), self.cfg)
    return self.project(y), past, stats

  def read(self, x, q, keys: SparseLatent, ctx: Context, fresh: bool):
    """Picks and reads -> (chosen [B T K], Read); `q` as `query` makes it."""
    cfg = self.cfg
    query = self.index_query(x, ctx.positions)
    sight = query_blocks.sight(ctx.positions, ctx.segments, fresh)
    theirs = ctx.segments if fresh else None
    chosen = kernels.pick(
      'indexer',
      lambda impl: choose_by_kernel(query, keys.index, sight, cfg.top_k, impl),
      lambda: index.choose(
        query,
        keys.index,
        sight,
        cfg.top_k,
        key_segments=theirs,
        most=cfg.block,
      ),
    )
    ups = jnp.split(self.kv_up[...], [cfg.nope_dim], axis=-1)
    args = q, keys[:2], ups, chosen
    own = lambda: read_chosen(*args, scale=cfg.scale, most=cfg.block)
    if ctx.train and fresh:
      return chosen, own()  # its loss wants the shares
    by_kernel = lambda impl: read_by_kernel(*args, scale=cfg.scale, impl=impl)
    return chosen, kernels.pick('sparse_mla', by_kernel, own)

  def scene(self, x, q, new: SparseLatent, ctx: Context) -> Scene:
    """What the indexer's loss needs of fresh tokens."""
    detached = jax.lax.stop_gradient
    q, k = jnp.concatenate(q, axis=-1), self.keys_values(Latent(*new[:2]))[0]
    return Scene(
      detached(q),
      detached(k),
      self.index_query(x, ctx.positions),
      new.index,
      query_blocks.sight(ctx.positions, ctx.segments, fresh=True),
      ctx.segments,
    )
