"""Speculative decoding without loss (arXiv:2211.17192): drafts, then a verdict.

Blocks of multi-token prediction draft k tokens; one call of the model gives the
distribution that each of them, and the one after the last, should have been
drawn from. `accept` keeps drafts so that what comes out follows the target's
law exactly, whatever the drafts were; `match` keeps those that plain decoding
with the same noise would have drawn, so the tokens themselves are equal.
Legend: R rows, k drafts, V vocabulary, T tokens of a call, D model, n streams.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import Model


class Acceptance(NamedTuple):
  """Holds which drafts stay, and the token that comes after them."""

  accepted: jax.Array  # [R] int32, of the first drafts
  token: jax.Array  # [R] int32


class Drafts(NamedTuple):
  """Holds drafts, what they were drawn from, and the cache that made them."""

  tokens: jax.Array  # [R k] int32
  probs: jax.Array | None  # [R k V]; None: each was the only possible one
  cache: Cache


# (logits [R V], number of the draft) -> tokens [R] and what they were drawn
# from, [R V]; None for a choice without chance
Choice = Callable[[jax.Array, int], tuple[jax.Array, jax.Array | None]]


def likeliest(logits: jax.Array, number: int) -> tuple[jax.Array, None]:
  """Drafts the first of the likeliest tokens, without chance."""
  del number
  return logits.argmax(axis=-1).astype(jnp.int32), None


def accept(
  target: jax.Array,
  drafts: jax.Array,
  count: jax.Array,
  uniform: jax.Array,
  probs: jax.Array | None = None,
) -> Acceptance:
  """Keeps drafts so that tokens follow the target's law.

  A draft d stays with probability min(1, p(d) / q(d)), with p its target and q
  what it was drawn from; the first that doesn't is replaced by a draw from what
  p has more than q. Where all stay, one more token is drawn from its target.

  Args:
    target: [R 1+k V], the distributions after temperature, penalties, cuts and
      grammar; one-hot where nothing is left to chance. Each sums to 1.
    drafts: [R k] int32.
    count: [R] int32, how many drafts a row has: the first ones.
    uniform: [R 1+k] in [0, 1), independent: one for each draft, then one for
      the token after them.
    probs: [R k V], what drafts were drawn from; None: without chance.
  """
  k, V = drafts.shape[1], target.shape[-1]
  if not k:
    return Acceptance(jnp.zeros_like(count), drawn(target[:, 0], uniform[:, 0]))
  if probs is None:
    probs = jax.nn.one_hot(drafts, V, dtype=target.dtype)
  pick = lambda a: jnp.take_along_axis(a, drafts[..., None], axis=-1)[..., 0]
  p, q = pick(target[:, :k]), pick(probs)
  # As a product, for q may be 0; where p >= q rounding must not reject.
  stays = jnp.where(p >= q, p > 0, uniform[:, :k] * q < p)
  stays &= jnp.arange(k) < count[:, None]
  accepted = jnp.cumprod(stays, axis=1, dtype=jnp.int32).sum(axis=1)
  at = lambda a, i: jnp.take_along_axis(a, i[:, None, None], axis=1)[:, 0]
  p, q = at(target, accepted), at(probs, jnp.minimum(accepted, k - 1))
  left = jnp.where((accepted < count)[:, None], jnp.maximum(p - q, 0), p)
  # Nothing is left only where p is q but for rounding.
  left = jnp.where((left > 0).any(axis=-1, keepdims=True), left, p)
  return Acceptance(accepted, drawn(left, uniform[:, k]))


def match(plain: jax.Array, drafts: jax.Array, count: jax.Array) -> Acceptance:
  """Keeps drafts that plain decoding would have drawn.

  Its noise depends on a row's seed and position alone, so the tokens are those
  of plain decoding, whatever was drafted. A draft without chance stays with
  probability p(d), as by `accept`; one drawn by the same noise with at least
  (1 - t) / (1 + t) for a total variation distance t, `accept` has 1 - t.

  Args:
    plain: [R 1+k] int32, what would be drawn after each of the drafts before.
    drafts: [R k] int32.
    count: [R] int32, how many drafts a row has: the first ones.
  """
  k = drafts.shape[1]
  stays = (plain[:, :k] == drafts) & (jnp.arange(k) < count[:, None])
  accepted = jnp.cumprod(stays, axis=1, dtype=jnp.int32).sum(axis=1)
  token = jnp.take_along_axis(plain, accepted[:, None], axis=1)[:, 0]
  return Acceptance(accepted.astype(jnp.int32), token.astype(jnp.int32))


def drawn(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Draws a token of weights [R V] by uniform [R] in [0, 1): [R] int32.

  It is the first whose cumulative weight is above `uniform` of the sum. What
  has no weight is never drawn.
  """
  V = weights.shape[-1]
  total = jnp.cumsum(weights, axis=-1)
  # Sums that are taken in parallel may rise where there is no weight.
  has = weights > 0
  above = has & (total > uniform[:, None] * total[:, -1:])
  number = jnp.arange(V)
  first = jnp.where(above, number, V).min(axis=-1)
  last = jnp.where(has, number, 0).max(axis=-1)
  return jnp.where(first < V, first, last).astype(jnp.int32)


def propose(
  model: Model,
  variables: dict,
  state: jax.Array,
  tokens: jax.Array,
  cache: Cache,
  start: jax.Array,
  count: jax.Array,
  *,
  drafts: int,
  choose: Choice = likeliest,
) -> Drafts:
  """Drafts the tokens that follow some that are certain.

  The cache then holds these; what the drafts have written beyond is
  overwritten by the next call, for which its rings need `drafts` spare slots.
  Of blocks deeper than 1 the last rows rest on drafts: a wrong one makes later
  drafts less likely to stay, no more.

  Args:
    model: with multi-token prediction; variables: its own.
    state: [R T D] or [R T n D], `aux['mtp_state']` of the last tokens.
    tokens: [R T] int32, the token after each of them; all are certain.
    cache: of `init_mtp_cache`, with the tokens before these.
    start: [R] int32, position of the first state.
    count: [R] int32, how many of the T are a row's, the first ones; a row
      without any drafts nothing that means something.
    drafts: k, at least 1. Those beyond `mtp.depth` come from its last block,
      whose state is then taken for that of the next position.
    choose: how a draft is drawn.
  """
  T, depths = tokens.shape[1], model.config.mtp.depth
  places, rows = jnp.arange(T), jnp.arange(tokens.shape[0])
  positions, last = start[:, None] + places, jnp.maximum(count - 1, 0)
  valid = places < count[:, None]
  # At the end of a cache there is no place for more states.
  fits = lambda at: at < cache.slots
  out, made = None, []
  for number in range(drafts):
    depth = number + 1
    if out is not None:
      token, state = made[-1][0], out.state
      if depth <= depths:
        # Each place now takes the token after, the last one the draft.
        tokens = jnp.roll(tokens, -1, axis=1).at[rows, last].set(token)
      else:
        state = state[rows, last][:, None]
        tokens, positions = token[:, None], positions[rows, last][:, None] + 1
        valid, last = valid[rows, last][:, None], jnp.zeros_like(last)
    out = model.draft(
      variables,
      state,
      tokens,
      cache,
      positions,
      valid & fits(positions),
      depth=depth,
    )
    cache = out.cache
    made.append(choose(out.logits[rows, last], number))
  drawn_from = [probs for _, probs in made]
  probs = None if drawn_from[0] is None else jnp.stack(drawn_from, axis=1)
  return Drafts(jnp.stack([t for t, _ in made], axis=1), probs, cache)
