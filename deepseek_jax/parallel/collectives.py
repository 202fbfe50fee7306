"""Collectives with gradients of their own: sums, and gathered arrays.

Legend: B rows, T numbers of a device, n devices.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def total(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
  """Returns the psum of x over `axes`, inside shard_map.

  All devices of `axes` must do the same with the result. Then each has the
  same share of its gradient, and adding up the shares needs no second round.
  (psum's own derivative is a psum; replication is not checked here, so JAX
  cannot know.)
  """
  return jax.lax.psum(x, axes)


def _forward(
  x: jax.Array, axes: str | tuple[str, ...]
) -> tuple[jax.Array, None]:
  """Returns the sum, and nothing to keep for the gradient."""
  return total(x, axes), None


def _backward(
  axes: str | tuple[str, ...], _, grad: jax.Array
) -> tuple[jax.Array]:
  """Returns the share of the gradient times the devices: the gradient."""
  return (grad * jax.lax.psum(1, axes),)


total.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, axis: str) -> jax.Array:
  """Returns x [B T ...] of all devices of `axis`, [B n*T ...].

  The gradient is a sum over devices: in float32, though each device's part
  travels in the dtype of x. (A reduce-scatter would add up in that.)
  """
  return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def _gathered_fwd(x: jax.Array, axis: str) -> tuple[jax.Array, None]:
  """Returns what was gathered, and nothing to keep for the gradient."""
  return gathered(x, axis), None


def _gathered_bwd(axis: str, _, grad: jax.Array) -> tuple[jax.Array]:
  """Returns the gradient of x [B T ...], summed over devices in float32."""
  if grad.dtype.itemsize >= 4:
    return (jax.lax.psum_scatter(grad, axis, scatter_dimension=1, tiled=True),)
  # 16-bit gradients travel as they are, but a reduce-scatter would add them up
  # in 16 bits: exchange the shards, then sum over devices in float32.
  parts = jax.lax.all_to_all(grad, axis, 1, 1, tiled=True)
  ways = jax.lax.psum(1, axis)
  # [B n*T ...] -> [B n T ...]
  parts = parts.reshape(parts.shape[0], ways, -1, *parts.shape[2:])
  return (parts.astype(jnp.float32).sum(axis=1).astype(grad.dtype),)


gathered.defvjp(_gathered_fwd, _gathered_bwd)
