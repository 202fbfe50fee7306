"""Absorbed latent attention over a paged cache in XLA."""

import jax
import jax.numpy as jnp


def gather_pages(pages: jax.Array, table: jax.Array) -> jax.Array:
  """Returns pages [P G D] in the order of table [B J]: [B J*G D]."""
  (B, J), (_, G, D) = table.shape, pages.shape
  return pages[table].reshape(B, J * G, D)


def mla_decode(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  scale: float,
  scales: jax.Array | None = None,
) -> jax.Array:
  """Returns the attention of the new tokens [B T H C]."""
  T = q_c.shape[1]
  keys = gather_pages(c, table).astype(jnp.float32)
  if scales is not None:
    of_group = gather_pages(scales, table)
    keys *= jnp.repeat(of_group, keys.shape[-1] // of_group.shape[-1], axis=-1)
  shared = gather_pages(k_r, table).astype(jnp.float32)
  scores = jnp.einsum('BTHC,BSC->BTHS', q_c.astype(jnp.float32), keys)
  scores += jnp.einsum('BTHR,BSR->BTHS', q_r.astype(jnp.float32), shared)
  # Query t of T attends to all but the T - 1 - t newest tokens.
  seen = lengths[:, None] - (T - 1) + jnp.arange(T)  # [B T]
  mask = jnp.arange(keys.shape[1]) < seen[..., None]  # [B T S]
  mask = mask[:, :, None]
  scores = jnp.where(mask, scores, -1e30)
  top = scores.max(-1, keepdims=True, initial=-1e30)
  weights = jnp.where(mask, jnp.exp((scores - top) * scale), 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1)
  # What lies behind the length is arbitrary, and 0 * nan is nan.
  behind = jnp.arange(keys.shape[1]) < lengths[:, None]
  keys = jnp.where(behind[..., None], keys, 0)
  return jnp.einsum('BTHS,BSC->BTHC', weights, keys).astype(q_c.dtype)
