"""Causal attention within segments in XLA."""

import jax
import jax.numpy as jnp


def mla_prefill(q, k, v, starts, scale):
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
