"""Compiles what an engine runs: prefill of chunks, and loops of decoding.

Both gather the pages of their rows, run the training model's own `apply`, draw
by each row's settings, and put the touched pages back; where a kernel can,
decoding reads and fills latents in their pages, those of multi-token prediction
as well. Where grammars have to read drafts ahead, these are made by a program
of their own first. A shape is a bucket: the number of rows, of tokens and of
pages is static, all else is data.
Legend: R rows, T tokens of a chunk, N steps of a loop, W tokens of a step at
most, M = N W, V vocabulary, S stop tokens of a row, A likeliest tokens, L MoE
layers, K chosen experts, k drafts of a bucket.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.infer import checked_drafts, paged_latents, sampler
from deepseek_jax.infer.checked_drafts import Checked, Foreseen, LoopRows
from deepseek_jax.infer.paging import Caches, Paging, Rows, Store
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.sampler import Drawn, Draws
from deepseek_jax.model.stacks import moe_statistics
from deepseek_jax.model.transformer import Model, Output
from deepseek_jax.parallel import processor
from deepseek_jax.parallel.sharding import Using, under

STOPS = 16  # stop tokens of a request at most


class Scores(NamedTuple):
  """Holds the log-probabilities of given tokens; zeros unless wanted."""

  logprob: jax.Array  # [R T] float32
  top: jax.Array  # [R T A] int32
  top_logprob: jax.Array  # [R T A] float32


class Chunk(NamedTuple):
  """Holds tokens to prefill."""

  tokens: jax.Array  # [R T] int32
  following: jax.Array  # [R T] int32, the token after each
  before: jax.Array  # [R k] int32, the tokens before
  echo: jax.Array  # [] bool, whether to score the following ones


class Going(NamedTuple):
  """Holds rows to decode."""

  token: jax.Array  # [R] int32, drawn last and not cached yet
  limit: jax.Array  # [R] int32, tokens to draw at most
  stops: jax.Array  # [R S] int32, -1 where there is none
  calls: jax.Array  # [] int32, of the model at most
  foreseen: Foreseen  # drafts that grammars have read ahead


class Decoded(NamedTuple):
  """Holds what a loop of decoding has drawn."""

  drawn: Drawn  # each [R M ...], of which a row's first `count` are its own
  count: jax.Array  # [R] int32
  accepted: jax.Array  # [R] int32, drafts that stayed
  calls: jax.Array  # [R] int32, of the model in which a row took part
  experts: jax.Array | None  # [R M L K] int32, those of the tokens read


class Programs(NamedTuple):
  """Holds the jitted functions; a store that is given is donated."""

  # (variables, store, Rows, Chunk) -> store, Scores, experts [L R T K] or None
  prefill: Callable
  # (variables, store, Rows, Going, Draws) -> store, Decoded
  decode: Callable
  # the same -> store, drafts [R k]; decoding drafts them again
  draft: Callable

  def compiled(self) -> int:
    """Returns how many programs have been compiled."""
    return sum(program._cache_size() for program in self)


class Shape(NamedTuple):
  """Says what programs are made for, beside the model.

  Attributes:
    paging: of the model's flat form, see `prepared.build_flat`.
    steps: N.
    draft_rows: with more rows nothing is drafted.
    routing: whether they give the experts of each token.
    kept: whether they give what each draw could have taken.
  """

  paging: Paging
  steps: int
  draft_rows: int
  routing: bool
  kept: bool = False


@functools.lru_cache(maxsize=32)
def programs(model: Model, shape: Shape, using: Using | None) -> Programs:
  """Returns the programs of a model.

  Args:
    model: as it trains.
    shape: see there.
    using: the mesh; what is traced depends on it, which jit does not know. The
      programs are traced with it wherever they are called first.
  """
  functions = plain(model, shape, using)

  def jitted(run: Callable, program: processor.Program, **how) -> Callable:
    xla = processor.options(program, model.config.compute.xla)
    return jax.jit(run, compiler_options=xla, **how)

  return Programs(
    jitted(functions.prefill, 'prefill', donate_argnums=1),
    jitted(functions.decode, 'decode', donate_argnums=1),
    jitted(functions.draft, 'decode', donate_argnums=1),
  )


def plain(model: Model, shape: Shape, using: Using | None = None) -> Programs:
  """Returns the functions that `programs` jits."""
  flat = build_flat(model)
  everywhere = NamedSharding(using.mesh, PartitionSpec()) if using else None

  def whole(tree: Any) -> Any:
    """Returns a tree that every device has whole."""
    if everywhere is None:
      return tree
    return jax.lax.with_sharding_constraint(tree, everywhere)

  def traced(run: Callable) -> Callable:
    """Returns a program that sees the mesh."""

    def inside(*args) -> tuple:
      with under(using) if using else contextlib.nullcontext():
        store, *rest = run(flat, shape, *args)
      # The host reads the rest, of several processes each one's.
      return store, *(whole(one) for one in rest)

    return inside

  return Programs(traced(_prefill), traced(_decode), traced(_draft))


def _prefill(
  model: Model,
  shape: Shape,
  variables: dict,
  store: Store,
  rows: Rows,
  chunk: Chunk,
) -> tuple[Store, Scores, jax.Array | None]:
  """Caches a chunk; see `Programs`."""
  T, held = chunk.tokens.shape[1], shape.paging.view(store, rows)
  out = model.apply(
    variables,
    chunk.tokens,
    positions=rows.start[:, None] + jnp.arange(T),
    # Padding is segment 0, which is cached nowhere.
    segment_ids=(jnp.arange(T) < rows.count[:, None]).astype(jnp.int32),
    cache=held.cache,
    mtp_state=bool(shape.paging.drafts),
  )
  held = held._replace(cache=out.cache)
  if shape.paging.drafts:
    held = checked_drafts.caught_up(
      model, variables, held, out, rows, chunk.tokens, chunk.before
    )
  store = shape.paging.commit(store, held, rows, T)
  every = lambda: _scores(_logits(model, variables, out.hidden), chunk)
  none = lambda: jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(every)
  )
  scores = jax.lax.cond(chunk.echo, every, none)
  return store, scores, _experts(out) if shape.routing else None


def _decode(
  model: Model,
  shape: Shape,
  variables: dict,
  store: Store,
  rows: Rows,
  going: Going,
  draws: Draws,
) -> tuple[Store, Decoded]:
  """Draws up to N W tokens for each row; see `Programs`."""
  R, drafts = going.token.shape[0], shape.paging.drafts
  one = functools.partial(_plain, model, variables, kept=shape.kept)
  if drafts:
    drafts = drafts if shape.draft_rows >= R else 0
    check = functools.partial(checked_drafts.check, model, variables)
    one = functools.partial(
      check, going.foreseen, drafts=drafts, kept=shape.kept
    )
  W, each = 1 + drafts, jnp.arange(R)[:, None]
  most = shape.steps * W

  def run(held: Caches, place: LoopRows) -> tuple[Checked, tuple]:
    made = one(held, place, draws._replace(history=place.history))
    chosen = _by_row(_experts(made.output)) if shape.routing else None
    return made, (made.drawn, chosen)

  def body(state: tuple) -> tuple:
    step, held, place, count, accepted, calls, kept = state
    made, found = run(held, place)
    number = _ends(going, place.active, made, count)
    last = jnp.maximum(number - 1, 0)[:, None]
    pick = lambda a: jnp.take_along_axis(a, last, axis=1)[:, 0]
    ended = (number > 0) & pick(_stopped(going, made.drawn))
    # A row's tokens lie one after the other, whatever a step gave.
    at = jnp.where(jnp.arange(W) < number[:, None], count[:, None], most)
    at = at + jnp.arange(W)
    put = lambda a, new: a.at[each, at].set(new, mode='drop')
    kept = jax.tree.map(put, kept, found)
    beyond = place.history.shape[1]
    where = jnp.where(at < most, rows.start[:, None] + 1 + at, beyond)
    token = jnp.where(place.active, pick(made.drawn.token), place.token)
    place = LoopRows(
      place.at + number,
      token,
      place.active & ~ended & (count + number < going.limit),
      place.history.at[each, where].set(made.drawn.token, mode='drop'),
    )
    held = made.held
    if held.ready is not None:
      held = held._replace(ready=jnp.where(number > 0, number, held.ready))
    accepted = accepted + last[:, 0]
    return (
      step + 1,
      held,
      place,
      count + number,
      accepted,
      calls + (number > 0),
      kept,
    )

  in_pages = paged_latents.wanted(model.config.compute, store, shape.paging)
  held = shape.paging.view(store, rows, in_pages)
  none = jnp.zeros(R, jnp.int32)
  history = jnp.asarray(draws.history)
  place = LoopRows(rows.start, going.token, rows.count > 0, history)
  steps = jnp.minimum(shape.steps, going.calls)
  _, like = jax.eval_shape(run, held, place)
  kept = jax.tree.map(
    lambda a: jnp.zeros((R, most, *a.shape[2:]), a.dtype), like
  )
  _, held, _, count, accepted, calls, kept = jax.lax.while_loop(
    lambda s: (s[0] < steps) & s[2].active.any(),
    body,
    (0, held, place, none, none, none, kept),
  )
  rows = rows._replace(count=count)
  store = shape.paging.commit(store, held, rows, most)
  return store, Decoded(kept[0], count, accepted, calls, kept[1])


def _draft(
  model: Model,
  shape: Shape,
  variables: dict,
  store: Store,
  rows: Rows,
  going: Going,
  draws: Draws,
) -> tuple[Store, jax.Array]:
  """Returns what the next call of decoding would draft, [R k] int32."""
  in_pages = paged_latents.wanted(model.config.compute, store, shape.paging)
  held = shape.paging.view(store, rows, in_pages)
  history = jnp.asarray(draws.history)
  place = LoopRows(rows.start, going.token, rows.count > 0, history)
  drafts = going.foreseen.drafts.shape[1]
  guesses, mtp = checked_drafts.guessed(
    model, variables, held, place, draws, drafts
  )
  # No token is added: what isn't written in pages is not put back.
  rows = rows._replace(count=jnp.zeros_like(rows.count))
  held = held._replace(mtp=mtp)
  return shape.paging.commit(store, held, rows, drafts), guesses


def _plain(
  model: Model,
  variables: dict,
  held: Caches,
  place: LoopRows,
  draws: Draws,
  *,
  kept: bool,
) -> Checked:
  """Runs the model on the last token of each row, and draws the next."""
  out = model.apply(
    variables,
    place.token[:, None],
    positions=place.at[:, None],
    segment_ids=place.active.astype(jnp.int32)[:, None],
    cache=held.cache,
  )
  logits = _logits(model, variables, out.hidden[:, 0])
  drawn = sampler.draw(logits, draws, place.at + 1, kept=kept)
  drawn = jax.tree.map(lambda a: a[:, None], drawn)
  held = held._replace(cache=out.cache)
  return Checked(held, out, drawn, jnp.ones_like(place.at))


def _stopped(going: Going, drawn: Drawn) -> jax.Array:
  """Returns whether a row ends with a token, [R W] bool."""
  stops = drawn.token[..., None] == going.stops[:, None]
  return stops.any(axis=-1) | ~drawn.sound


def _ends(
  going: Going, active: jax.Array, made: Checked, count: jax.Array
) -> jax.Array:
  """Returns how many of the tokens of a step count, [R] int32."""
  stopped = _stopped(going, made.drawn)
  W = stopped.shape[1]
  first = jnp.where(stopped, jnp.arange(W), W).min(axis=1)
  number = jnp.minimum(made.count, first + 1)
  number = jnp.minimum(number, going.limit - count)
  return jnp.where(active, number, 0)


def _logits(model: Model, variables: dict, hidden: jax.Array) -> jax.Array:
  """Returns logits [... V], float32, of hidden [... D]."""
  f32 = {'preferred_element_type': jnp.float32}
  return jnp.einsum('...D,DV->...V', hidden, model.head(variables), **f32)


def _experts(out: Output) -> jax.Array | None:
  """Returns the experts of each token [L R T K]; None without MoE layers."""
  return moe_statistics(out.aux, 'experts')


def _by_row(experts: jax.Array | None) -> jax.Array | None:
  """Returns experts [L R T K] as [R T L K]."""
  return None if experts is None else experts.transpose(1, 2, 0, 3)


def _scores(logits: jax.Array, chunk: Chunk) -> Scores:
  """Returns the log-probabilities of the tokens after a chunk's."""
  at = chunk.following[..., None]
  norm = jax.scipy.special.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
  return Scores(picked - norm, *sampler.likeliest(logits, jnp.bool(True)))
