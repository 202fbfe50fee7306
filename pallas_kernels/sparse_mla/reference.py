"""Attention over gathered latents in XLA, a few queries at a time."""

import jax
import jax.numpy as jnp

_ENTRIES = 2**22  # numbers of gathered latents that live at once


def attend(
  q_c: jax.Array,
  q_r: jax.Array,
  index: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the attention [H C] of one query: q_c [H C], q_r [H R].

  index [K] chooses from c [S C] and k_r [S R], both float32.
  """
  here = index >= 0
  at = jnp.where(here, index, 0)
  wide = lambda a: a.astype(jnp.float32)
  # Latents that are not chosen may be anything, nan too.
  keys = jnp.where(here[:, None], c[at], 0)
  shared = jnp.where(here[:, None], k_r[at], 0)
  scores = wide(q_c) @ keys.T + wide(q_r) @ shared.T
  scores = jnp.where(here, scores * scale, -1e30)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.where(here, jnp.exp(scores - top), 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1)
  return (weights @ keys).astype(q_c.dtype)


def sparse_mla(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  index: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the attention [B T H C], a few queries at a time."""
  if not index.size:
    return jnp.zeros_like(q_c)
  size = max(1, _ENTRIES // (index.shape[-1] * (c.shape[-1] + k_r.shape[-1])))

  def row(args: tuple) -> jax.Array:
    *queries, c, k_r = args
    # Before the loop, so that all queries' gradients add up in float32.
    c, k_r = c.astype(jnp.float32), k_r.astype(jnp.float32)
    one = jax.checkpoint(lambda a: attend(*a, c, k_r, scale))
    return jax.lax.map(one, tuple(queries), batch_size=size)

  return jnp.stack([row(a) for a in zip(q_c, q_r, index, c, k_r)])
