"""Grouped-query attention over gathered rows in XLA, by few queries."""

import jax
import jax.numpy as jnp

_ENTRIES = 2**22  # numbers of gathered rows that live at once


def attend(
  q: jax.Array, index: jax.Array, k: jax.Array, v: jax.Array, scale: float
) -> jax.Array:
  """Returns the attention [J V] of one group of one query.

  q [J K], index [M] of k [S K] and v [S V], both float32.
  """
  here = index >= 0
  at = jnp.where(here, index, 0)
  # Rows that are not chosen may be anything, nan too.
  keys, values = (jnp.where(here[:, None], a[at], 0) for a in (k, v))
  scores = jnp.where(here, q.astype(jnp.float32) @ keys.T * scale, -1e30)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.where(here, jnp.exp(scores - top), 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1)
  return (weights @ values).astype(q.dtype)


def sparse_gqa(
  q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array, scale: float
) -> jax.Array:
  """Returns the attention [B T G J V]."""
  if not index.size:
    return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
  size = max(1, _ENTRIES // (index.shape[-1] * (k.shape[-1] + v.shape[-1])))

  def group(args: tuple) -> jax.Array:
    q, index, k, v = args
    # Before the loop, so that all queries' gradients add up in float32.
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    one = jax.checkpoint(lambda a: attend(*a, k, v, scale))
    return jax.lax.map(one, (q, index), batch_size=size)

  B, T, G = q.shape[:3]
  # One group of one row after the other: [B G T ...].
  first = lambda a: jnp.moveaxis(a, 2, 1).reshape(B * G, *_without(a))
  out = jax.lax.map(group, tuple(map(first, (q, index, k, v))))
  return jnp.moveaxis(out.reshape(B, G, T, *out.shape[2:]), 1, 2)


def _without(a: jax.Array) -> tuple[int, ...]:
  """Returns the shape of a [B N G ...] without B and G."""
  return (a.shape[1], *a.shape[3:])
