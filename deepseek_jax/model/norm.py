"""Normalises by the root mean square (arXiv:1910.07467), in float32.

Legend: D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.parallel.sharding import param


class RMSNorm(nnx.Module):
  """Computes x / rms(x) * scale over the last axis [... D]; keeps the dtype."""

  def __init__(self, dim: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
    """Makes the scale [D], float32 ones."""
    self.eps = eps
    ones = nnx.initializers.ones
    self.scale = param(rngs, ones, (dim,), (None,), full_precision=True)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x [... D] normalised and scaled, in its dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale.astype(jnp.float32)).astype(x.dtype)
