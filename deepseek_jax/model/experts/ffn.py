"""SwiGLU feed-forward network (arXiv:2002.05202): down(silu(gate x) * up x).

Legend: B batch, T tokens, D model, F hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.model.context import Context
from deepseek_jax.parallel.sharding import param, shard, ways


@dataclasses.dataclass(frozen=True)
class FFNConfig:
  """width: F; limit: V4's clamp of gate (from above) and up (both sides)."""

  width: int
  limit: float | None = None

  def __post_init__(self):
    at_least(self, width=1)
    above(self, limit=0)

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'FFN':
    return FFN(self, dim, std=std, rngs=rngs)


def swiglu(gate_up: jax.Array, limit: float | None = None) -> jax.Array:
  """[... 2F], gate half then up half -> [... F].

  With a limit, silu(min(gate, limit)) * clip(up, -limit, limit) (V4).
  """
  return gated(*jnp.split(gate_up, 2, axis=-1), limit)


def gated(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
  """`swiglu` of its halves [... F]."""
  if limit is not None:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return jax.nn.silu(gate) * up


class FFN(nnx.Module):
  """The dense FFN, and the shared experts of a MoE layer (one wide SwiGLU)."""

  def __init__(self, cfg: FFNConfig, dim: int, *, std, rngs: nnx.Rngs):
    self.limit = cfg.limit
    init = nnx.initializers.normal(std)
    D, F = dim, cfg.width
    # gate and up side by side: one matmul instead of two.
    self.gate_up = param(rngs, init, (D, 2, F), ('embed', None, 'mlp'))
    self.down = param(rngs, init, (F, D), ('mlp', 'embed'))

  def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict]:
    """x [B T D] -> (y [B T D], no statistics)."""
    D, _, F = self.gate_up.shape
    weight = self.gate_up[...]
    if ways('mlp', F) > 1:
      # Side by side, halves would lie across other devices than they are on.
      both = jnp.einsum('BTD,DNF->BTNF', x, weight)
      h = gated(both[:, :, 0], both[:, :, 1], self.limit)
    else:
      h = swiglu(x @ weight.reshape(D, 2 * F), self.limit)
    return shard(h, 'batch', 'seq', 'mlp') @ self.down[...], {}
