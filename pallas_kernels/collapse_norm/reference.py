"""The normed sum of residual streams, in XLA."""

import jax
import jax.numpy as jnp


def collapse_norm(
  streams: jax.Array, pre: jax.Array, gain: jax.Array, eps: float
) -> jax.Array:
  """Returns the normed sum [N D]."""
  x = jnp.einsum('NnD,Nn->ND', streams.astype(jnp.float32), pre)
  x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
  return (x * gain).astype(streams.dtype)


def collapse_norm_bwd(
  streams: jax.Array,
  pre: jax.Array,
  gain: jax.Array,
  grad: jax.Array,
  eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of streams, pre and gain."""
  wide = streams.astype(jnp.float32), pre, gain
  _, pull = jax.vjp(lambda *args: collapse_norm(*args, eps), *wide)
  dstreams, dpre, dgain = pull(grad.astype(jnp.float32))
  return dstreams.astype(streams.dtype), dpre, dgain
