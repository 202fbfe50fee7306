"""Residual streams mixed, and an output added to each, in XLA."""

import jax
import jax.numpy as jnp


def write_streams(
  streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array
) -> jax.Array:
  """Returns the new streams [N n D]."""
  mixed = jnp.einsum('NjD,Njk->NkD', streams.astype(jnp.float32), comb)
  added = post[..., None] * y[:, None].astype(jnp.float32)
  return (mixed + added).astype(streams.dtype)


def write_streams_bwd(
  streams: jax.Array,
  y: jax.Array,
  post: jax.Array,
  comb: jax.Array,
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of streams, y, post and comb."""
  wide = streams.astype(jnp.float32), y.astype(jnp.float32), post, comb
  _, pull = jax.vjp(write_streams, *wide)
  dstreams, dy, dpost, dcomb = pull(grad.astype(jnp.float32))
  return dstreams.astype(streams.dtype), dy.astype(y.dtype), dpost, dcomb
