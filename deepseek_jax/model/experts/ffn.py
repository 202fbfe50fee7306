"""Computes the SwiGLU feed-forward network: down(silu(gate x) * up x).

See arXiv:2002.05202.
Legend: B batch, T tokens, D model, F hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import products
from deepseek_jax.parallel.sharding import param, shard, ways


@dataclasses.dataclass(frozen=True)
class FFNConfig:
  """Describes a SwiGLU.

  Attributes:
    width: F.
    limit: V4's clamp of gate (from above) and up (both sides); None: none.
  """

  width: int
  limit: float | None = None

  def __post_init__(self):
    """Raises InputError unless width >= 1 and limit > 0."""
    at_least(self, width=1)
    above(self, limit=0)

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'FFN':
    """Returns the FFN of a model of width `dim`."""
    return FFN(self, dim, std=std, rngs=rngs)


def swiglu(gate_up: jax.Array, limit: float | None = None) -> jax.Array:
  """Computes the activation of [... 2F], gate half then up half: [... F].

  With a limit, silu(min(gate, limit)) * clip(up, -limit, limit) (V4).
  """
  return gated(*jnp.split(gate_up, 2, axis=-1), limit)


def gated(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
  """Computes `swiglu` from its halves [... F]."""
  if limit is not None:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return jax.nn.silu(gate) * up


class FFN(nnx.Module):
  """Computes the dense FFN, or the shared experts of a MoE layer.

  Shared experts are one wide SwiGLU.
  """

  def __init__(self, cfg: FFNConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes gate_up [D 2 F] and down [F D], drawn with `std`."""
    self.limit = cfg.limit
    init = nnx.initializers.normal(std)
    D, F = dim, cfg.width
    # Gate and up side by side: one matmul instead of two.
    self.gate_up = param(rngs, init, (D, 2, F), ('embed', None, 'mlp'))
    self.down = param(rngs, init, (F, D), ('mlp', 'embed'))

  def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict]:
    """Returns y [B T D] of x [B T D], and no statistics."""
    D, _, F = self.gate_up.shape
    weight = self.gate_up[...]
    if ways('mlp', F) > 1:
      # Flattened, the halves would be sharded over other devices than they
      # are on.
      both = products.einsum('BTD,DNF->BTNF', x, weight)
      h = gated(both[:, :, 0], both[:, :, 1], self.limit)
    else:
      h = swiglu(products.matmul(x, weight.reshape(D, 2 * F)), self.limit)
    # The hidden units [B T F] stay sharded; `down` sums over them.
    h = shard(h, 'batch', 'seq', 'mlp')
    return products.matmul(h, self.down[...]), {}
