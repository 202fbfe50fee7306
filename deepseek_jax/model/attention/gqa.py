"""Computes multi-head, grouped-query and multi-query attention.

The baselines of MLA (arXiv:2305.13245): kv_heads = heads is MHA, 1 is MQA,
between is GQA.
Legend: B batch, T queries, S cache slots, D model, H heads, G key heads,
K head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import cache as caching
from deepseek_jax.model.attention.rope import (
  RopeConfig,
  rope,
  softmax_multiplier,
)
from deepseek_jax.model.attention.softmax import (
  cached_attention,
  causal_attention,
)
from deepseek_jax.model.context import Context
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import gathered_attention, products
from deepseek_jax.parallel import sequence as context
from deepseek_jax.parallel.gathered_attention import repeat_groups
from deepseek_jax.parallel.sequence import Along
from deepseek_jax.parallel.sharding import param, shard, ways


@dataclasses.dataclass(frozen=True)
class GQAConfig:
  """Describes grouped-query attention.

  Attributes:
    heads: H.
    kv_heads: G, which divides H.
    head_dim: K, even.
    rope: of queries and keys.
    qk_norm: every head of queries and keys is normalised before it is rotated,
      with one scale [K] for all heads of each (Qwen3).
    norm_eps: of these norms.
  """

  heads: int
  kv_heads: int
  head_dim: int
  rope: RopeConfig = RopeConfig(interleaved=False)
  qk_norm: bool = False
  norm_eps: float = 1e-6

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    at_least(self, heads=1, kv_heads=1, head_dim=1)
    above(self, norm_eps=0)
    if self.heads % self.kv_heads:
      raise InputError(
        f'kv_heads = {self.kv_heads}: must divide heads = {self.heads}'
      )
    if self.head_dim % 2:
      raise InputError(f'head_dim = {self.head_dim}: must be even for rope')

  @property
  def scale(self) -> float:
    """Returns what multiplies the scores."""
    return self.head_dim**-0.5 * softmax_multiplier(self.rope)

  def cache(
    self,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> 'KeyValue':
    """Returns an empty cache: 2 G K numbers per slot.

    A slot is a position, which a rewound row overwrites: `spare` adds none.
    """
    del spare
    shape = (batch, slots, self.kv_heads, self.head_dim)
    return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'GQA':
    """Returns the attention of a model of width `dim`."""
    return GQA(self, dim, std=std, rngs=rngs)


class KeyValue(NamedTuple):
  """Holds keys and values of tokens; also the cache."""

  k: jax.Array  # [B S G K], rotated
  v: jax.Array  # [B S G K]


def grouped_attention(
  q: jax.Array,
  keys: KeyValue,
  *,
  scale: float,
  segments: jax.Array | None = None,
) -> jax.Array:
  """Computes causal attention of a batch to itself, on each device's shard.

  Args:
    q: [B T H K].
    keys: of the same tokens.
    scale: multiplies the scores.
    segments: [B T] int32 document of each token, or None for one document.

  Returns:
    [B T H K].
  """

  def local(
    along: Along, q: jax.Array, keys: KeyValue, segments: jax.Array | None
  ) -> jax.Array:
    if not along.axis:
      return causal_attention(q, *keys, scale=scale, segments=segments)
    seen = gathered_attention.sequence(along, q.shape[1], segments)
    every = tuple(along.gather(keys))
    return gathered_attention.attend(repeat_groups, q, every, (), seen, scale)

  H, G = q.shape[2], keys.k.shape[2]
  if ways('heads', H) != ways('heads', G):  # so few groups can't be sharded
    keys = KeyValue(*repeat_groups(q.shape[2:], keys))
  rows, heads = ('batch', 'seq'), ('batch', 'seq', 'heads')
  return context.split(
    local,
    (q, keys, segments),
    (heads, heads, rows),
    heads,
    **dict(zip(heads, q.shape)),
  )


class GQA(nnx.Module):
  """Attends with H query heads that share G heads of keys and values."""

  def __init__(self, cfg: GQAConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes q [D H K], k and v [D G K], out [H K D], and norms if any."""
    self.cfg = cfg
    D, H, G, K = dim, cfg.heads, cfg.kv_heads, cfg.head_dim
    init = nnx.initializers.normal(std)
    self.q = param(rngs, init, (D, H, K), ('embed', 'heads', None))
    self.k = param(rngs, init, (D, G, K), ('embed', 'kv_heads', None))
    self.v = param(rngs, init, (D, G, K), ('embed', 'kv_heads', None))
    self.out = param(rngs, init, (H, K, D), ('heads', None, 'embed'))
    if cfg.qk_norm:
      self.q_norm = RMSNorm(K, eps=cfg.norm_eps, rngs=rngs)
      self.k_norm = RMSNorm(K, eps=cfg.norm_eps, rngs=rngs)

  def projections(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """Returns q [B T H K], k and v [B T G K] of x [B T D], not rotated."""
    weights = self.q[...], self.k[...], self.v[...]
    D, G, K = weights[1].shape
    if ways('heads', G) == 1:
      return tuple(products.einsum('BTD,DGK->BTGK', x, w) for w in weights)
    # As one product, by groups: its gradient is summed over devices once.
    apart = [w.reshape(D, G, -1, K) for w in weights]
    both = jnp.concatenate(apart, axis=2)
    y = products.einsum('BTD,DGJK->BTGJK', x, both)
    parts = jnp.split(y, [y.shape[3] - 2, y.shape[3] - 1], axis=3)
    return tuple(part.reshape(*x.shape[:2], -1, K) for part in parts)

  def __call__(
    self, x: jax.Array, ctx: Context, past: KeyValue | None = None
  ) -> tuple[jax.Array, KeyValue | None, dict]:
    """Returns y [B T D], the cache with the tokens of x [B T D], and {}."""
    cfg = self.cfg
    q, k, v = self.projections(x)  # [B T H K], [B T G K] twice
    if cfg.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)  # per head, before they rotate
    q, k = (rope(a, ctx.positions, cfg.rope) for a in (q, k))
    q = shard(q, 'batch', 'seq', 'heads', None)
    if past is not None:
      past = KeyValue(
        *(
          caching.write(b, n, ctx.positions, ctx.valid)
          for b, n in zip(past, (k, v))
        )
      )
    # A first call attends to its own tokens, later ones to the cache.
    if past is None or ctx.fresh:
      how = {'scale': cfg.scale, 'segments': ctx.segments}
      y = grouped_attention(q, KeyValue(k, v), **how)
    else:
      y = cached_attention(q, *past, ctx.positions, scale=cfg.scale)
    y = shard(y, 'batch', 'seq', 'heads', None)
    return products.einsum('BTHK,HKD->BTD', y, self.out[...]), past, {}
