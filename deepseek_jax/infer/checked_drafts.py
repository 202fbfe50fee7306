"""Lets multi-token prediction guess tokens that the model then checks.

Each step of decoding drafts k tokens for every row, runs the model once on the
last token and the drafts, and draws at each place as plain decoding would, with
the noise of that position. Drafts that equal what is drawn stay, so the tokens
are those of plain decoding, and several may come from one call of the model.
Legend: R rows, T tokens, k drafts of this call, K drafts at most, W = 1 + k
places, V vocabulary, D model, n streams, B = ceil(V / 32).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.infer import sampler
from deepseek_jax.infer.paging import Caches, Rows
from deepseek_jax.infer.sampler import Drawn, Draws
from deepseek_jax.infer.speculation import match, propose
from deepseek_jax.model.transformer import Model, Output


class LoopRows(NamedTuple):
  """Says where rows stand in a loop of decoding."""

  at: jax.Array  # [R] int32, position of the last token
  token: jax.Array  # [R] int32, which is not cached yet
  active: jax.Array  # [R] bool
  history: jax.Array  # [R H] int32, all tokens by position


class Foreseen(NamedTuple):
  """Holds drafts that were made before, and what may follow each of them.

  A grammar is followed on the host, so it has to know the drafts before the
  model reads them.
  """

  there: jax.Array  # [] bool; without, drafts are made when they are checked
  drafts: jax.Array  # [R k] int32
  allowed: jax.Array  # [R k B] int32, as `Draws.allowed`; -1 where all may come


class Checked(NamedTuple):
  """Holds what one call of the model gave."""

  held: Caches
  output: Output  # of W places
  drawn: Drawn  # each [R W ...]
  count: jax.Array  # [R] int32, tokens that stay: accepted drafts and one more


def caught_up(
  model: Model, variables: dict, held: Caches, output: Output, rows: Rows,
  tokens: jax.Array, before: jax.Array,
) -> Caches:  # fmt: skip
  """Returns what is held after a chunk of prefill.

  Args:
    model, variables: as for `apply`.
    held: before the chunk, but for the model's own cache.
    output: of the chunk, with its 'mtp_state'.
    rows: where the chunk lies.
    tokens: [R T] int32.
    before: [R K] int32, the tokens before them.
  """
  K, (R, T) = before.shape[1], tokens.shape
  made, ready = output.aux['mtp_state'], held.ready[:, None]
  # States that waited come first, then those of the chunk but its last one,
  # whose next token isn't known.
  # A cache has room for all that are real, whatever the chunk's padding.
  place = jnp.arange(min(T + K, held.mtp.slots))
  joined = jnp.concatenate([held.state, made], axis=1)
  at = jnp.where(place < ready, place, 1 + K + place - ready)
  state = _rows(joined, jnp.minimum(at, joined.shape[1] - 1))
  around = jnp.concatenate([before, tokens], axis=1)  # from start - K on
  after = jnp.minimum(K - ready + place + 1, K + T - 1)
  begun = rows.count > 0
  proposal = propose(
    model,
    variables,
    state,
    _rows(around, after),
    held.mtp,
    rows.start - held.ready,
    jnp.where(begun, held.ready + rows.count - 1, 0),
    drafts=model.config.mtp.depth,
  )
  last = made[jnp.arange(R), jnp.maximum(rows.count - 1, 0)]
  waits = jnp.zeros_like(held.state).at[:, 0].set(last)
  return held._replace(
    mtp=proposal.cache,
    state=_where(begun, waits, held.state),
    ready=jnp.where(begun, 1, held.ready),
  )


def check(
  model: Model,
  variables: dict,
  foreseen: Foreseen,
  held: Caches,
  place: LoopRows,
  draws: Draws,
  drafts: int,
  *,
  kept: bool = False,
) -> Checked:
  """Drafts, runs the model on the drafts, and draws at each place.

  Args:
    model, variables: as for `apply`.
    foreseen: drafts to check in place of those made here.
    held: of the rows.
    place: where they stand.
    draws: settings of the rows.
    drafts: k; 0 keeps the caches of multi-token prediction, but drafts none.
    kept: says what each draw could have taken.
  """
  cache, R = held.cache, place.token.shape[0]
  guesses, mtp = guessed(model, variables, held, place, draws, drafts)
  guesses = jnp.where(foreseen.there, foreseen.drafts, guesses)
  tokens = jnp.concatenate([place.token[:, None], guesses], axis=1)
  positions = place.at[:, None] + jnp.arange(1 + drafts)
  there = place.active[:, None] & (positions < cache.slots)
  out = model.apply(
    variables,
    tokens,
    positions=positions,
    segment_ids=there.astype(jnp.int32),
    cache=cache,
    mtp_state=True,
  )
  logits = jnp.einsum(
    'RWD,DV->RWV',
    out.hidden,
    model.head(variables),
    preferred_element_type=jnp.float32,
  )
  # Each place draws as if it were a row; what it draws rests on all before.
  rows = jnp.arange(R)[:, None]
  history = place.history.at[rows, positions[:, 1:]].set(guesses, mode='drop')
  each = jax.tree.map(
    lambda a: jnp.repeat(a, 1 + drafts, axis=0),
    draws._replace(history=history),
  )
  allowed = jnp.concatenate([draws.allowed[:, None], foreseen.allowed], axis=1)
  each = each._replace(allowed=allowed.reshape(-1, allowed.shape[-1]))
  flat = logits.reshape(-1, logits.shape[-1])
  drawn = sampler.draw(flat, each, positions.reshape(-1) + 1, kept=kept)
  drawn = jax.tree.map(lambda a: a.reshape(R, 1 + drafts, *a.shape[1:]), drawn)
  able = held.ready > 0
  verdict = match(drawn.token, guesses, jnp.where(able, drafts, 0))
  wide = held.state.shape[1] - 1 - drafts
  state = out.aux['mtp_state']
  state = jnp.pad(state, [(0, 0), (0, wide), *[(0, 0)] * (state.ndim - 2)])
  held = Caches(
    out.cache,
    mtp,
    _where(place.active, state, held.state),
    held.ready,
  )
  return Checked(held, out, drawn, verdict.accepted + 1)


def guessed(
  model: Model,
  variables: dict,
  held: Caches,
  place: LoopRows,
  draws: Draws,
  drafts: int,
) -> tuple[jax.Array, object]:
  """Returns drafts [R k], and the caches that made them; args as `check`."""
  R, waiting = place.token.shape[0], jnp.arange(held.state.shape[1])
  start = place.at - held.ready
  after = start[:, None] + 1 + waiting  # positions of the tokens after each
  after = jnp.clip(after, 0, place.history.shape[1] - 1)

  def choose(logits: jax.Array, number: int) -> tuple[jax.Array, None]:
    # As the model will draw there, if its logits are the same. What a grammar
    # allows is known of the first place alone.
    how = draws._replace(allowed=jnp.full_like(draws.allowed, -1))
    how = how if number else draws
    return sampler.draw(logits, how, place.at + 1 + number).token, None

  proposal = propose(
    model,
    variables,
    held.state,
    _rows(place.history, after),
    held.mtp,
    start,
    jnp.where(place.active, held.ready, 0),
    drafts=drafts or model.config.mtp.depth,
    choose=choose,
  )
  if not drafts:
    return jnp.zeros((R, 0), jnp.int32), proposal.cache
  return proposal.tokens, proposal.cache


def _rows(array: jax.Array, at: jax.Array) -> jax.Array:
  """Returns array [R S ...] at places [R T]: [R T ...]."""
  return array[jnp.arange(array.shape[0])[:, None], at]


def _where(which: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns rows of a where `which` [R] holds, else those of b."""
  return jnp.where(which.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
