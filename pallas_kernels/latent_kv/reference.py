"""Latents of tokens into a paged cache, in XLA."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference as quantize

GROUP = 128  # numbers of a latent that share a scale


def rotate(
  k: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool
) -> jax.Array:
  """Returns k [N R] rotated by the angles of cos and sin [N R/2]."""
  if interleaved:
    a, b = k[:, 0::2], k[:, 1::2]
    pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return pairs.reshape(k.shape)
  a, b = jnp.split(k, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def put(pages: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns pages [P G .] with rows [N .] at slots [N] of the flat cache."""
  flat = pages.reshape(-1, pages.shape[-1])
  # Below 0 is nowhere too; jax would count it from the end.
  slots = jnp.where(slots < 0, flat.shape[0], slots)
  flat = flat.at[slots].set(rows.astype(pages.dtype), mode='drop')
  return flat.reshape(pages.shape)


def latent_kv(
  x: jax.Array,
  w: jax.Array,
  gain: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  slots: jax.Array,
  cache: Any,
  eps: float,
  floor: float,
  interleaved: bool,
) -> Any:
  """Returns the cache with the latents of x written at `slots`."""
  kv = jnp.dot(x, w, preferred_element_type=jnp.float32)
  c, k = jnp.split(kv, [gain.shape[0]], axis=-1)
  c = c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + eps)
  c = c * gain.astype(jnp.float32)
  rows = {'c': c, 'k_r': rotate(k, cos, sin, interleaved)}
  if hasattr(cache, 'scales'):
    rows['c'], rows['scales'] = quantize.quantize(c, (1, GROUP), False, floor)
  return cache._replace(
    **{
      name: put(getattr(cache, name), slots, row) for name, row in rows.items()
    }
  )
