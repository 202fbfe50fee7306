"""Compiles what an engine runs: prefill of chunks, and loops of decoding.

Both gather the pages of their rows, run the training model's own `apply`, draw
by each row's settings, and put the touched pages back. A shape is a bucket: the
number of rows, of tokens and of pages is static, all else is data.
Legend: R rows, T tokens of a chunk, N steps of a loop, V vocabulary, S stop
tokens of a row, A likeliest tokens, L MoE layers, K chosen experts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.infer import sampler
from deepseek_jax.infer.paging import Paging, Rows, Store
from deepseek_jax.infer.sampler import Drawn, Draws
from deepseek_jax.infer.sampling import build_flat
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import Model, Output, moe_statistics
from deepseek_jax.parallel.sharding import Using

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
  echo: jax.Array  # [] bool, whether to score the following ones


class Going(NamedTuple):
  """Holds rows to decode."""

  token: jax.Array  # [R] int32, drawn last and not cached yet
  limit: jax.Array  # [R] int32, tokens to draw at most
  stops: jax.Array  # [R S] int32, -1 where there is none


class Programs(NamedTuple):
  """Holds the jitted functions; both give the store first, which is donated."""

  # (variables, store, Rows, Chunk) -> store, Scores, experts [L R T K] or None
  prefill: Callable
  # (variables, store, Rows, Going, Draws)
  # -> store, Drawn of [N R ...], count [R], experts [N L R K] or None
  decode: Callable

  def compiled(self) -> int:
    """Returns how many programs have been compiled."""
    return self.prefill._cache_size() + self.decode._cache_size()


@functools.lru_cache(maxsize=32)
def programs(
  model: Model, paging: Paging, steps: int, routing: bool, using: Using | None
) -> Programs:
  """Returns the programs of a model.

  Args:
    model: as it trains.
    paging: of its flat form, see `sampling.build_flat`.
    steps: N.
    routing: whether they give the experts of each token.
    using: the mesh; what is traced depends on it, which jit does not know.
  """
  del using
  flat = build_flat(model)
  head = lambda variables, hidden: jnp.einsum(
    '...D,DV->...V',
    hidden,
    flat.head(variables),
    preferred_element_type=jnp.float32,
  )
  experts = lambda out: _experts(out) if routing else None

  def prefill(
    variables: dict, store: Store, rows: Rows, chunk: Chunk
  ) -> tuple[Store, Scores, jax.Array | None]:
    T = chunk.tokens.shape[1]
    out = flat.apply(
      variables,
      chunk.tokens,
      positions=rows.start[:, None] + jnp.arange(T),
      # Padding is segment 0, which is cached nowhere.
      segment_ids=(jnp.arange(T) < rows.count[:, None]).astype(jnp.int32),
      cache=paging.view(store, rows),
    )
    store = paging.commit(store, out.cache, rows, T)
    every = lambda: _scores(head(variables, out.hidden), chunk)
    none = lambda: jax.tree.map(
      lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(every)
    )
    return store, jax.lax.cond(chunk.echo, every, none), experts(out)

  def decode(
    variables: dict, store: Store, rows: Rows, going: Going, draws: Draws
  ) -> tuple[Store, Drawn, jax.Array, jax.Array | None]:
    R = going.token.shape[0]

    def one(
      cache: Cache, token: jax.Array, count: jax.Array, history: jax.Array
    ) -> tuple[Cache, tuple[Drawn, jax.Array | None]]:
      at, active = rows.start + count[0], count[1]
      out = flat.apply(
        variables,
        token[:, None],
        positions=at[:, None],
        segment_ids=active.astype(jnp.int32)[:, None],
        cache=cache,
      )
      logits = head(variables, out.hidden[:, 0])
      now = draws._replace(history=history)
      return out.cache, (sampler.draw(logits, now, at + 1), experts(out))

    def body(state: tuple) -> tuple:
      step, cache, token, count, active, history, kept = state
      cache, made = one(cache, token, (count, active), history)
      kept = jax.tree.map(lambda a, new: a.at[step].set(new), kept, made)
      # Rows that have ended keep what they had.
      token = jnp.where(active, made[0].token, token)
      count = count + active
      place = jnp.where(active, rows.start + count, history.shape[1])
      history = history.at[jnp.arange(R), place].set(token, mode='drop')
      ends = (token[:, None] == going.stops).any(axis=1) | ~made[0].sound
      active = active & ~ends & (count < going.limit)
      return step + 1, cache, token, count, active, history, kept

    cache, history = paging.view(store, rows), jnp.asarray(draws.history)
    count, active = jnp.zeros(R, jnp.int32), rows.count > 0
    _, like = jax.eval_shape(one, cache, going.token, (count, active), history)
    kept = jax.tree.map(lambda a: jnp.zeros((steps, *a.shape), a.dtype), like)
    state = jax.lax.while_loop(
      lambda s: (s[0] < steps) & s[4].any(),
      body,
      (0, cache, going.token, count, active, history, kept),
    )
    cache, count, (drawn, chosen) = state[1], state[3], state[-1]
    store = paging.commit(store, cache, rows._replace(count=count), steps)
    return store, drawn, count, chosen

  return Programs(
    jax.jit(prefill, donate_argnums=1), jax.jit(decode, donate_argnums=1)
  )


def _experts(out: Output) -> jax.Array | None:
  """Returns the experts of each token [L R T K]; None without MoE layers."""
  return moe_statistics(out.aux, 'experts')


def _scores(logits: jax.Array, chunk: Chunk) -> Scores:
  """Returns the log-probabilities of the tokens after a chunk's."""
  at = chunk.following[..., None]
  norm = jax.scipy.special.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
  return Scores(picked - norm, *sampler.likeliest(logits, jnp.bool(True)))
