"""Scores as integers of the same order, which have room below the least."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NOTHING = np.int32(-(2**31))  # below the integer of every score


def ordered(scores: jax.Array) -> jax.Array:
  """Returns int32 in the order of the float32 scores, in which -0 is 0."""
  scores = jnp.where(scores == 0.0, 0.0, scores)
  word = lax.bitcast_convert_type(scores, jnp.int32)
  return jnp.where(word < 0, word ^ jnp.int32(2**31 - 1), word)
