"""Describes the tokens of a batch to every layer.

Legend: B batch, T tokens, V vocabulary, L layers with an Engram, K rows of a
token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model import lookup


class Context(NamedTuple):
  """Holds the batch as layers see it; the flags are Python values, not traced.

  `context` makes one from a caller's arrays.
  """

  tokens: jax.Array  # [B T] int32
  positions: jax.Array  # [B T] int32, from 0 within a document
  segments: jax.Array | None  # [B T] int32 document number; 0 = padding
  train: bool = False
  fresh: bool = True  # nothing is cached: tokens attend to each other only
  rows: jax.Array | None = None  # [B T L K] int32, see memory/engram.py
  before: jax.Array | None = None  # [B N-1] int32, see memory/ngram_hash.py
  routes: jax.Array | None = None  # [B T L K], in a layer [B T K]; see router

  @property
  def valid(self) -> jax.Array | None:
    """Returns [B T] bool, False on padding; None without segments."""
    return None if self.segments is None else self.segments > 0


def positions_in(segments: jax.Array) -> jax.Array:
  """Returns the position of each token in its run of equal segments [B T]."""
  index = jnp.arange(segments.shape[1])
  # The place in the row minus the place where its run begins.
  return index - jax.lax.cummax(jnp.where(_begins(segments), index, 0), axis=1)


def documents(segments: jax.Array) -> jax.Array:
  """Returns the number of each token's run of equal segments [B T], from 1.

  Padding (0 or less) gets 0. Some layers compare documents by their number,
  others look for where one ends: with a number for each run both mean the same.
  """
  real = segments > 0
  number = jnp.cumsum(_begins(segments) & real, axis=1, dtype=jnp.int32)
  return jnp.where(real, number, 0)


def _begins(segments: jax.Array) -> jax.Array:
  """Returns whether a run of equal segments begins at a token, [B T] bool."""
  first = jnp.ones_like(segments[:, :1], bool)
  return jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=1)


def context(
  tokens: jax.Array,
  segments: jax.Array | None,
  vocab: int,
  *,
  positions: jax.Array | None = None,
  rows: jax.Array | None = None,
  before: jax.Array | None = None,
  cached: bool = False,
  **flags: bool,
) -> Context:
  """Returns the context of tokens: the one place that reads a caller's arrays.

  Each run of equal segment ids becomes a document of its own, and what padding
  holds is not read, so it may be anything.

  Args:
    tokens: [B T] integers. What is not 0..V - 1 is no token: its embedding is
      NaN.
    segments: [B T] int32 or None, as in `Model.apply`.
    vocab: V.
    positions: [B T] int32; by default from 0 in each document.
    rows, before: as in Context.
    cached: whether there is a cache, where a row is one document. Rows with
      more have no token then: their logits are NaN.
    **flags: as in Context.
  """
  tokens = lookup.int32(tokens)
  if segments is None:
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Context(tokens, positions, None, rows=rows, before=before, **flags)
  real = segments > 0
  # Only padding is overwritten: a wrong id of a real token must show.
  tokens = jnp.where(real | ((tokens >= 0) & (tokens < vocab)), tokens, 0)
  if positions is None:
    positions = positions_in(segments)
  segments = documents(segments)
  if cached:
    # -1 is no token, so all logits of such a row are NaN.
    several = segments.max(axis=1, keepdims=True, initial=0) > 1
    tokens = jnp.where(several, -1, tokens)
  return Context(tokens, positions, segments, rows=rows, before=before, **flags)
