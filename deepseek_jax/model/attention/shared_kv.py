"""Computes V4's attention: one key-value head, a window, far entries.

Every head reads the same vectors, as keys and as values (section 2.3): those of
the last W tokens and, as a layer's `compress` says, entries that stand for many
tokens (csa.py, hca.py). Rope rotates their last channels, so what is read
carries the rotation of its place; rotating the output back by the query's own
makes it depend on distances alone. A sink per head takes part in the softmax.
The output goes through a low-rank projection of each group of heads.
Legend: B batch, T queries, D model, Q query latent, H heads, C head dim,
R rope dims, G groups, K = H C / G, O output rank, W window.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model.attention import csa, hca, ring
from deepseek_jax.model.attention.compressor import (
  Compressed,
  CompressorConfig,
  tail_rope,
)
from deepseek_jax.model.attention.csa import CSA, CSACache, CSAConfig
from deepseek_jax.model.attention.hca import HCA, HCAConfig
from deepseek_jax.model.attention.rope import RopeConfig, YarnConfig
from deepseek_jax.model.attention.shared_reading import Window, read
from deepseek_jax.model.context import Context
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import products
from deepseek_jax.parallel import sequence as context
from deepseek_jax.parallel.sequence import Along
from deepseek_jax.parallel.sharding import param, shard

# Cos and sin are not multiplied: the released models use no mscale.
COMPRESS_ROPE = RopeConfig(
  theta=160000.0,
  scaling=YarnConfig(
    factor=16.0,
    original_length=65536,
    mscale=None,
    mscale_all_dim=None,
    attention_factor=1.0,
  ),
)


@dataclasses.dataclass(frozen=True)
class SharedKVConfig:
  """Describes the shapes, and what a layer reads beside its window.

  Attributes:
    heads, head_dim: of the queries; keys and values are one head.
    rope_dim: the last channels of a head, which are rotated.
    q_rank: of the queries' latent.
    groups, o_rank: of the output projection.
    window: tokens that are read one by one, the query's own included.
    rope: of layers with a window alone.
    compress_rope: of all that is rotated in layers with entries.
    compress: what entries there are.
    csa, hca: their settings.
    norm_eps: of all norms inside.
  """

  heads: int
  head_dim: int
  rope_dim: int
  q_rank: int
  groups: int
  o_rank: int
  window: int = 128
  rope: RopeConfig = RopeConfig()
  compress_rope: RopeConfig = COMPRESS_ROPE
  compress: Literal['none', 'csa', 'hca'] = 'none'
  csa: CSAConfig = CSAConfig()
  hca: HCAConfig = HCAConfig()
  norm_eps: float = 1e-6

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    at_least(self, heads=1, head_dim=1, rope_dim=1, q_rank=1)
    at_least(self, groups=1, o_rank=1, window=1)
    above(self, norm_eps=0)
    if self.heads % self.groups:
      raise InputError(
        f'groups = {self.groups}: must divide heads = {self.heads}'
      )
    most = self.head_dim
    if self.compress == 'csa':
      most = min(most, self.csa.index_dim)
    if self.rope_dim % 2 or not 0 < self.rope_dim <= most:
      raise InputError(
        f'rope_dim = {self.rope_dim}: must be even and lie in 2..{most}, the'
        ' least of head_dim and csa.index_dim'
      )

  @property
  def scale(self) -> float:
    """Returns what multiplies the scores."""
    return self.head_dim**-0.5

  @property
  def layer_rope(self) -> RopeConfig:
    """Returns the rope of this layer."""
    return self.rope if self.compress == 'none' else self.compress_rope

  @property
  def measures_recall(self) -> bool:
    """Returns whether training logs the indexer's recall."""
    return self.compress == 'csa' and self.csa.measures_recall

  def compressor(self) -> CompressorConfig | None:
    """Returns the compressor of this layer's entries; None without any."""
    if self.compress == 'none':
      return None
    csa = self.compress == 'csa'
    return CompressorConfig(
      ratio=self.csa.ratio if csa else self.hca.ratio,
      overlap=csa,
      dim=self.head_dim,
      rope_dim=self.rope_dim,
      rope=self.compress_rope,
      norm_eps=self.norm_eps,
    )

  def cache(
    self,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> 'SharedKVCache':
    """Returns an empty cache: W vectors, and C numbers for every m slots.

    Its rings have `spare` more slots, by so many tokens it may be rewound.
    """
    window = jnp.zeros((batch, self.window + spare, self.head_dim), dtype)
    compress = self.compressor()
    if compress is None:
      return SharedKVCache(window, None)
    far = compress.cache(batch, slots, dtype, spare)
    if self.compress == 'csa':
      # The indexer's keys are smaller entries of the same windows.
      keys = dataclasses.replace(compress, dim=self.csa.index_dim)
      far = CSACache(far, keys.cache(batch, slots, dtype, spare))
    return SharedKVCache(window, far)

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'SharedKV':
    """Returns the attention of a model of width `dim`."""
    return SharedKV(self, dim, std=std, rngs=rngs)


class SharedKVCache(NamedTuple):
  """Holds the window of last tokens, and what is cached of entries."""

  window: jax.Array  # [B R C], a ring of rotated vectors; R >= W
  far: CSACache | Compressed | None


class SharedKV(nnx.Module):
  """Attends to a window and to compressed entries, with sinks."""

  def __init__(
    self, cfg: SharedKVConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes the projections, the sinks [H] and the attention to entries."""
    self.cfg = cfg
    D, H, C, Q = dim, cfg.heads, cfg.head_dim, cfg.q_rank
    G, O = cfg.groups, cfg.o_rank
    init = nnx.initializers.normal(std)
    norm = lambda width: RMSNorm(width, eps=cfg.norm_eps, rngs=rngs)
    self.q_down = param(rngs, init, (D, Q), ('embed', 'q_latent'))
    self.q_norm = norm(Q)
    self.q_up = param(rngs, init, (Q, H, C), ('q_latent', 'heads', None))
    self.kv = param(rngs, init, (D, C), ('embed', None))
    self.kv_norm = norm(C)
    zeros = nnx.initializers.zeros
    self.sinks = param(rngs, zeros, (H,), ('heads',), full_precision=True)
    self.out_down = param(
      rngs, init, (H // G * C, G, O), (None, 'groups', None)
    )
    self.out_up = param(rngs, init, (G, O, D), ('heads', None, 'embed'))
    make = {'std': std, 'rngs': rngs}
    if cfg.compress == 'csa':
      self.far = CSA(cfg.csa, cfg.compressor(), D, Q, **make)
    elif cfg.compress == 'hca':
      self.far = HCA(cfg.compressor(), D, **make)

  def query(
    self, x: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns rotated queries [B T H C] of x [B T D], their latent [B T Q]."""
    latent = self.q_norm(products.matmul(x, self.q_down[...]))
    q = products.einsum('BTQ,QHC->BTHC', latent, self.q_up[...])
    # Each head is normed, without weights, before rope.
    wide = q.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    q = (wide * jax.lax.rsqrt(mean + self.cfg.norm_eps)).astype(q.dtype)
    q = shard(q, 'batch', 'seq', 'heads', None)
    return tail_rope(
      q, positions, self.cfg.layer_rope, self.cfg.rope_dim
    ), latent

  def output(self, y: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates what heads read [B T H C] back and projects it: [B T D]."""
    y = tail_rope(y, -positions, self.cfg.layer_rope, self.cfg.rope_dim)
    y = y.astype(self.out_up[...].dtype)
    y = y.reshape(*y.shape[:2], self.cfg.groups, -1)  # [B T G K]
    y = products.einsum('BTGK,KGO->BTGO', y, self.out_down[...])  # [B T G O]
    return products.einsum('BTGO,GOD->BTD', y, self.out_up[...])

  def __call__(
    self, x: jax.Array, ctx: Context, past: SharedKVCache | None = None
  ) -> tuple[jax.Array, SharedKVCache | None, dict]:
    """Returns y [B T D], the cache with the tokens of x [B T D], statistics.

    In a call with a cache a row is one document, and its padding comes last.
    Statistics: those of CSA, in training.
    """
    cfg = self.cfg
    q, latent = self.query(x, ctx.positions)  # [B T H C], [B T Q]
    # One vector a token, key and value of all heads: [B T C].
    kv = self.kv_norm(products.matmul(x, self.kv[...]))
    kv = tail_rope(kv, ctx.positions, cfg.layer_rope, cfg.rope_dim)
    # One softmax over window, entries and sink: [B T H C].
    if past is None:
      y, stats = self._fresh(q, kv, x, latent, ctx)
    else:
      y, past = self._cached(q, kv, x, latent, ctx, past)
      stats = {}
    return self.output(y, ctx.positions), past, stats

  def _fresh(
    self,
    q: jax.Array,
    kv: jax.Array,
    x: jax.Array,
    latent: jax.Array,
    ctx: Context,
  ) -> tuple[jax.Array, dict]:
    """Computes a batch that attends only to itself: (y, statistics).

    Args:
      q: [B T H C].
      kv: [B T C].
      x: [B T D].
      latent: [B T Q].
      ctx: the tokens.
    """
    cfg, (B, T, H, _) = self.cfg, q.shape
    segments = ctx.segments
    if segments is None:
      segments = jnp.ones_like(ctx.positions)
    tokens = query = weights = None
    rows, heads = ('batch', 'seq'), ('batch', 'seq', 'heads')
    index_heads = H
    if cfg.compress != 'none':
      tokens, query, weights = self.far.inputs(x, latent, ctx)
    learn = ctx.train and cfg.compress == 'csa'
    if query is not None:
      index_heads = query.q.shape[2]
    names = ('loss', 'recall') if cfg.measures_recall else ('loss',)
    # Each device computes its queries and heads; index heads are sharded as
    # well, so both must divide.
    y, stats = context.split(
      functools.partial(_fresh, cfg, learn),
      (q, kv, self.sinks[...], segments, tokens, query, weights),
      (heads, rows, ('heads',), rows, rows, heads, ()),
      (heads, {name: ('batch',) for name in names if learn}),
      batch=B,
      seq=T,
      heads=math.gcd(H, index_heads),
    )
    stats = {name: values.mean() for name, values in stats.items()}
    if learn:
      stats['loss'] *= cfg.csa.loss
    return y, stats

  def _cached(
    self,
    q: jax.Array,
    kv: jax.Array,
    x: jax.Array,
    latent: jax.Array,
    ctx: Context,
    past: SharedKVCache,
  ) -> tuple[jax.Array, SharedKVCache]:
    """Computes tokens that follow a cache: (y, the cache with them)."""
    cfg, history, far, kept = self.cfg, None, None, None
    segments = ctx.segments
    if segments is None:
      segments = jnp.ones_like(ctx.positions)
    if not ctx.fresh:
      # The W - 1 tokens before these, out of the ring.
      start = ctx.positions[:, 0]
      there = ring.before(start, cfg.window) >= 0
      history = (
        ring.unroll(past.window, start, cfg.window),
        jnp.where(there, 1, -1).astype(segments.dtype),
      )
      # A row is one document: 1, and 0 for padding.
      segments = (segments > 0).astype(segments.dtype)
    if cfg.compress != 'none':
      # Entries that the cache and these tokens make.
      far, kept = self.far(q, x, latent, ctx, past.far, scale=cfg.scale)
    near = Window(kv, segments, cfg.window, history)
    y, _ = read(q, near, far, self.sinks[...], cfg.scale)
    window = ring.write(past.window, kv, ctx.positions, ctx.valid)
    return y, SharedKVCache(window, kept)


def _fresh(
  cfg: SharedKVConfig,
  learn: bool,
  along: Along,
  q: jax.Array,
  kv: jax.Array,
  sinks: jax.Array,
  segments: jax.Array,
  tokens: Any,
  query: Any,
  weights: Any,
) -> tuple[jax.Array, dict]:
  """Computes y of the local queries, and the indexer's statistics.

  A window reaches into the devices before.
  """
  history, far, W = None, None, cfg.window
  if along.axis:
    history = along.before(kv, W - 1), along.before(segments, W - 1, -1)
  make, scale = cfg.compressor(), cfg.scale
  if cfg.compress == 'hca':
    far = hca.fresh(make, along, q, tokens, weights, scale)
  elif cfg.compress == 'csa':
    makes = make, dataclasses.replace(make, dim=cfg.csa.index_dim)
    given = cfg.csa, makes, along, q, tokens, query, weights
    far = csa.fresh(*given, scale=scale, learn=learn)
  return read(q, Window(kv, segments, W, history), far, sinks, scale)
