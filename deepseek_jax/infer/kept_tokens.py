"""Packs which tokens of the vocabulary a draw kept, a bit for each.

Legend: V vocabulary, W 32-bit words.
"""

import jax
import jax.numpy as jnp

BITS = 32  # of a word of kept tokens


def words_of(vocab: int) -> int:
  """Returns W, the words that hold one bit for each token."""
  return -(-vocab // BITS)


def packed(kept: jax.Array) -> jax.Array:
  """Returns bools [... V] as bits, [... W] uint32; the first is the lowest."""
  vocab = kept.shape[-1]
  filler = [(0, 0)] * (kept.ndim - 1) + [(0, words_of(vocab) * BITS - vocab)]
  bits = jnp.pad(kept, filler).astype(jnp.uint32)
  bits = bits.reshape(*kept.shape[:-1], -1, BITS)
  place = jnp.arange(BITS, dtype=jnp.uint32)
  return (bits << place).sum(axis=-1, dtype=jnp.uint32)


def unpacked(words: jax.Array, vocab: int) -> jax.Array:
  """Inverts `packed`: [... W] -> bools [... V]."""
  place = jnp.arange(BITS, dtype=jnp.uint32)
  bits = (words[..., None] >> place) & 1
  return bits.reshape(*words.shape[:-1], -1)[..., :vocab].astype(bool)
