"""Causal attention within segments in XLA."""

import jax
import jax.numpy as jnp


def mla_prefill(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> jax.Array:
  """Returns the attention [B T H V] from all scores [B H T T]."""
  T = q.shape[1]
  scores = jnp.einsum(
    'BTHD,BSHD->BHTS', q, k, preferred_element_type=jnp.float32
  )
  keys = jnp.arange(T)
  mask = (starts[..., None] <= keys) & (keys <= keys[:, None])  # [B T S]
  scores = jnp.where(mask[:, None], scores * scale, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1)
  out = jnp.einsum('BHTS,BSHV->BTHV', weights, v.astype(jnp.float32))
  return out.astype(q.dtype)
