"""Picks the best of integers as one bit per key, and finds the set bits.

Without a sort: counts find the K-th largest, a few bits at a time.
Legend: T or N queries, S keys, W words of 32 keys, K positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ordered import NOTHING

_WORD = 32


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


def best(ordered: jax.Array, top_k: int) -> jax.Array:
  """Returns the top_k greatest of ordered [N S] int32 as bits [N S/32].

  Of equal ones the first are taken, and NOTHING never. S is a multiple of 32.
  """
  level = _level(ordered, top_k)[:, None]
  above = _words(ordered > level)
  equal = _words((ordered == level) & (level != NOTHING))
  count = lambda words: lax.population_count(words).astype(jnp.int32)
  # Of the words of equal ones those that come first, and the lowest bits of
  # the one in which there are enough.
  wanted = top_k - count(above).sum(axis=1, keepdims=True)
  each = count(equal)
  left = wanted - (jnp.cumsum(each, axis=1) - each)
  return above | _lowest(equal, left)


def _level(ordered: jax.Array, top_k: int) -> jax.Array:
  """Returns the largest integer that top_k of ordered [N S] reach: [N].

  NOTHING where fewer than top_k are more.
  """
  return lax.platform_dependent(
    ordered,
    cpu=functools.partial(_by_bits, top_k=top_k),
    default=functools.partial(_by_digits, top_k=top_k),
  )


def _by_bits(ordered: jax.Array, top_k: int) -> jax.Array:
  """Finds the level a bit at a time, in 32 counts."""
  # A sum of slices is vectorised, a sum along the last axis is not: 6 us of
  # 4,096 numbers for 24.
  width = ordered.shape[1] // _WORD

  def bit(i: jax.Array, low: jax.Array) -> jax.Array:
    # From -2**31 up: adding 2**31 to it wraps to 0, as it should.
    more = low + lax.shift_left(jnp.int32(1), 31 - i)
    reached = sum(
      (ordered[:, i * width : (i + 1) * width] >= more[:, None]).astype(
        jnp.int32
      )
      for i in range(_WORD)
    )
    return jnp.where(reached.sum(axis=1) >= top_k, more, low)

  low = jnp.full_like(ordered[:, 0], NOTHING)
  return lax.fori_loop(0, 32, bit, low)


def _by_digits(ordered: jax.Array, top_k: int) -> jax.Array:
  """Finds the level four bits at a time, in eight counts of fifteen limits."""
  sign = jnp.uint32(1 << 31)
  unsigned = lax.bitcast_convert_type(ordered, jnp.uint32) ^ sign
  low = jnp.zeros(ordered.shape[0], jnp.uint32)
  for shift in range(28, -4, -4):
    limits = [low + jnp.uint32(digit << shift) for digit in range(1, 16)]
    reached = _counts([unsigned >= limit[:, None] for limit in limits])
    digits = sum((count >= top_k).astype(jnp.uint32) for count in reached)
    low += digits << shift
  return lax.bitcast_convert_type(low ^ sign, jnp.int32)


def _counts(hits: list[jax.Array]) -> tuple[jax.Array, ...]:
  """Returns how many of each of hits [N S] are true, [N] each.

  One sum of many: apart, XLA would add up the parts of each in a program of
  its own.
  """
  ones = tuple(hit.astype(jnp.int32) for hit in hits)
  add = lambda a, b: tuple(map(lax.add, a, b))
  return lax.reduce(ones, (jnp.int32(0),) * len(ones), add, (1,))


def _words(hit: jax.Array) -> jax.Array:
  """Returns hit [N S] as bits, uint32 [N S/32]."""
  place = jnp.arange(_WORD, dtype=jnp.uint32)
  ones = hit.reshape(hit.shape[0], -1, _WORD).astype(jnp.uint32)
  return (ones << place).sum(axis=-1, dtype=jnp.uint32)


def _lowest(words: jax.Array, count: jax.Array) -> jax.Array:
  """Returns words with their `count` lowest set bits alone."""
  count = jnp.maximum(count, 0)
  end = place(words, count).astype(jnp.uint32)
  fewer = words & ((jnp.uint32(1) << end) - 1)
  all_ = count >= lax.population_count(words).astype(jnp.int32)
  return jnp.where(all_, words, fewer)
