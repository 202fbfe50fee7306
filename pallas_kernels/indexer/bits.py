"""Positions of the set bits, from one bit per key.

Legend: T queries, W words of 32 keys, K positions.
"""

import jax
import jax.numpy as jnp


def place(word: jax.Array, rank: jax.Array) -> jax.Array:
  """Returns where the set bit with `rank` lower ones lies in each word."""
  found = jnp.zeros_like(rank)
  for width in (16, 8, 4, 2, 1):
    low = jax.lax.population_count(word & jnp.uint32((1 << width) - 1))
    low = low.astype(jnp.int32)
    above = rank >= low
    rank = jnp.where(above, rank - low, rank)
    word = jnp.where(above, word >> width, word)
    found = jnp.where(above, found + width, found)
  return found


def _take(a: jax.Array, at: jax.Array) -> jax.Array:
  """Returns a[t, at[t, k]] by one index: XLA folds pairs into a constant."""
  row = jnp.arange(a.shape[0], dtype=jnp.int32)[:, None] * a.shape[1]
  return a.reshape(-1).at[row + at].get(mode='promise_in_bounds')


def _first_above(upto: jax.Array, wanted: jax.Array) -> jax.Array:
  """Returns the first word whose count upto [T W] is above wanted: [T K]."""
  W = upto.shape[1]
  word = jnp.zeros((upto.shape[0], wanted.shape[1]), jnp.int32)
  for power in reversed(range(W.bit_length())):
    ahead = word + (1 << power)
    at = jnp.minimum(ahead, W) - 1
    passed = _take(upto, at) <= wanted
    word = jnp.where((ahead <= W) & passed, ahead, word)
  return jnp.minimum(word, W - 1)


def positions(words: jax.Array, count: int) -> jax.Array:
  """Returns the positions of the set bits, int32 [T count].

  They ascend, with -1 behind the last one.

  Args:
    words: [T W] uint32; bit i of word j stands for position 32 j + i.
    count: positions to return of each row.
  """
  each = jax.lax.population_count(words).astype(jnp.int32)
  upto = jnp.cumsum(each, axis=1)
  wanted = jnp.arange(count, dtype=jnp.int32)[None]
  word = _first_above(upto, wanted)
  rank = wanted - (_take(upto, word) - _take(each, word))
  at = 32 * word + place(_take(words, word), rank)
  return jnp.where(wanted < upto[:, -1:], at, -1)
