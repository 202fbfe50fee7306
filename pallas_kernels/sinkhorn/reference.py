"""Sinkhorn normalisation of small matrices in XLA."""

import jax
import jax.numpy as jnp


def _divide(m: jax.Array, axis: int, eps: float) -> jax.Array:
  """Returns m divided by its sums over `axis`, eps added."""
  return m / (m.sum(axis=axis, keepdims=True) + eps)


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
  """Returns the normalised matrices [N n n]."""
  m = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) + eps
  m = _divide(m, -2, eps)

  def both(m: jax.Array, _) -> tuple:
    return _divide(_divide(m, -1, eps), -2, eps), None

  return jax.lax.scan(both, m, length=iterations - 1)[0]


def sinkhorn_bwd(
  logits: jax.Array, grad: jax.Array, iterations: int, eps: float
) -> jax.Array:
  """Returns the gradient of the logits [N n n]."""
  pull = jax.vjp(lambda x: sinkhorn(x, iterations, eps), logits)[1]
  return pull(grad)[0]
