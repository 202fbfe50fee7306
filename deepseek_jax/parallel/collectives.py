"""Sums over devices, and over what devices make of gathered arrays.

Legend: B rows, T numbers of a device, n devices.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def total(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
  """psum inside shard_map, where all of `axes` do the same with the result.

  Then each has the same share of its gradient, and adding up the shares needs
  no second round. (psum's own derivative is a psum; replication is not checked
  here, so JAX cannot know.)
  """
  return jax.lax.psum(x, axes)


def _forward(x, axes):
  return total(x, axes), None


def _backward(axes, _, grad):
  return (grad * jax.lax.psum(1, axes),)


total.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, axis: str) -> jax.Array:
  """Returns x [B T ...] of all devices of `axis`, [B n*T ...].

  The gradient is a sum over devices: in float32, though each device's part
  travels in the dtype of x. (A reduce-scatter would add up in that.)
  """
  return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def _gathered_fwd(x, axis):
  return gathered(x, axis), None


def _gathered_bwd(axis, _, grad):
  if grad.dtype.itemsize >= 4:
    return (jax.lax.psum_scatter(grad, axis, scatter_dimension=1, tiled=True),)
  parts = jax.lax.all_to_all(grad, axis, 1, 1, tiled=True)
  ways = jax.lax.psum(1, axis)
  parts = parts.reshape(parts.shape[0], ways, -1, *parts.shape[2:])
  return (parts.astype(jnp.float32).sum(axis=1).astype(grad.dtype),)


gathered.defvjp(_gathered_fwd, _gathered_bwd)
