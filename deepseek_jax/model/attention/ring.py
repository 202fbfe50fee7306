"""Holds ring buffers: what a layer caches of the last tokens of each row.

Token p of a row lies in slot p modulo R. Within a call the valid tokens of a
row come first and follow the cached ones; padding comes after them.
A row may go on at an earlier position than the one after its last token, as it
does when guessed tokens turn out wrong. What they overwrote is gone, so a ring
that is read W - 1 tokens back and rewound by up to k needs R = W + k slots.
Legend: B batch, R slots, W window, T new tokens.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model import cache as caching


def before(start: jax.Array, window: int) -> jax.Array:
  """Returns the W - 1 positions before start [B]: [B W-1]; some below 0."""
  return start[:, None] + jnp.arange(1 - window, 0)


def unroll(ring: jax.Array, start: jax.Array, window: int) -> jax.Array:
  """Returns the W - 1 tokens of ring [B R ...] before start [B], in order."""
  B, R = ring.shape[:2]
  return ring[jnp.arange(B)[:, None], before(start, window) % R]


def write(
  ring: jax.Array,
  new: jax.Array,
  positions: jax.Array,
  valid: jax.Array | None,
) -> jax.Array:
  """Returns the ring after new [B T ...] at positions [B T].

  Tokens that are not `valid` [B T] are not written.
  """
  R = ring.shape[1]
  if valid is None:
    valid = jnp.ones(positions.shape, bool)
  # Of more than R tokens the last ones stay: a slot is written just once.
  last = jnp.where(valid, positions, -1).max(axis=1, keepdims=True)
  kept = valid & (positions > last - R)
  return caching.write(ring, new, positions % R, kept)
