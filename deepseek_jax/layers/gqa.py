"""Multi-head, grouped-query and multi-query attention (arXiv:2305.13245).

The baselines of MLA: kv_heads = heads is MHA, 1 is MQA, between is GQA.
Legend: B batch, T queries, S cache slots, D model, H heads, G key heads,
K head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax import cache as caching
from deepseek_jax.errors import InputError
from deepseek_jax.layers.attention import cached_attention, causal_attention
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.rope import RopeConfig, rope, softmax_multiplier
from deepseek_jax.parallel import context
from deepseek_jax.parallel.gathered_attention import grouped_attention
from deepseek_jax.sharding import param, shard


@dataclasses.dataclass(frozen=True)
class GQAConfig:
  heads: int
  kv_heads: int
  head_dim: int
  rope: RopeConfig = RopeConfig(interleaved=False)

  def __post_init__(self):
    for name in ('heads', 'kv_heads', 'head_dim'):
      if getattr(self, name) < 1:
        raise InputError(f'{name} = {getattr(self, name)}: must be at least 1')
    if self.heads % self.kv_heads:
      raise InputError(
        f'kv_heads = {self.kv_heads}: must divide heads = {self.heads}'
      )
    if self.head_dim % 2:
      raise InputError(f'head_dim = {self.head_dim}: must be even for rope')

  @property
  def scale(self) -> float:
    return self.head_dim**-0.5 * softmax_multiplier(self.rope)

  def cache(self, batch: int, slots: int, dtype) -> 'KeyValue':
    """An empty cache: 2 G K numbers per slot."""
    shape = (batch, slots, self.kv_heads, self.head_dim)
    return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'GQA':
    return GQA(self, dim, std=std, rngs=rngs)


class KeyValue(NamedTuple):
  k: jax.Array  # [B S G K], turned
  v: jax.Array  # [B S G K]


class GQA(nnx.Module):
  def __init__(self, cfg: GQAConfig, dim: int, *, std, rngs: nnx.Rngs):
    self.cfg = cfg
    D, H, G, K = dim, cfg.heads, cfg.kv_heads, cfg.head_dim
    init = nnx.initializers.normal(std)
    self.q = param(rngs, init, (D, H, K), ('embed', 'heads', None))
    self.k = param(rngs, init, (D, G, K), ('embed', 'kv_heads', None))
    self.v = param(rngs, init, (D, G, K), ('embed', 'kv_heads', None))
    self.out = param(rngs, init, (H, K, D), ('heads', None, 'embed'))

  def __call__(
    self, x: jax.Array, ctx: Context, past: KeyValue | None = None
  ) -> tuple[jax.Array, KeyValue | None, dict]:
    """x [B T D] -> (y [B T D], cache with these tokens, no statistics)."""
    cfg = self.cfg
    q = rope(
      jnp.einsum('BTD,DHK->BTHK', x, self.q[...]), ctx.positions, cfg.rope
    )
    k = rope(
      jnp.einsum('BTD,DGK->BTGK', x, self.k[...]), ctx.positions, cfg.rope
    )
    v = jnp.einsum('BTD,DGK->BTGK', x, self.v[...])
    q = shard(q, 'batch', 'seq', 'heads', None)
    if past is not None:
      past = KeyValue(
        *(
          caching.write(b, n, ctx.positions, ctx.valid)
          for b, n in zip(past, (k, v))
        )
      )
    if past is None or ctx.fresh:
      split = context.mesh_axis(q.shape[1])
      attention = grouped_attention if split else causal_attention
      y = attention(q, k, v, scale=cfg.scale, segments=ctx.segments)
    else:
      y = cached_attention(q, *past, ctx.positions, scale=cfg.scale)
    y = shard(y, 'batch', 'seq', 'heads', None)
    return jnp.einsum('BTHK,HKD->BTD', y, self.out[...]), past, {}
