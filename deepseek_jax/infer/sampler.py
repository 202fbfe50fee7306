"""Draws the next token of each row by the row's own settings.

What a row gets depends on its own logits, settings, history and seed alone,
whatever stands in the rows beside it.
Legend: R rows, V vocabulary, H tokens of history, K biased tokens, A likeliest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.infer import kept_tokens
from deepseek_jax.infer.request import Request

TOP = 20  # likeliest tokens that are given beside a drawn one
BIASES = 320  # biased tokens of a request at most
_INTS = ('top_k', 'prompt', 'seed_low', 'seed_high', 'wants_top')
_FLOATS = (
  'temperature',
  'top_p',
  'min_p',
  'repetition_penalty',
  'presence_penalty',
  'frequency_penalty',
)


class Draws(NamedTuple):
  """Holds the settings of rows, packed so that a call has few arguments."""

  ints: jax.Array  # [R I] int32, columns as in _INTS
  floats: jax.Array  # [R F] float32, columns as in _FLOATS
  biased: jax.Array  # [R K] int32, V where there is none
  bias: jax.Array  # [R K] float32
  allowed: jax.Array  # [R ceil(V / 32)] int32, a bit for each token
  history: jax.Array  # [R H] int32, prompt and answer so far

  def int(self, name: str) -> jax.Array:
    """Returns one setting of all rows, [R] int32."""
    return self.ints[:, _INTS.index(name)]

  def float(self, name: str) -> jax.Array:
    """Returns one setting of all rows, [R] float32."""
    return self.floats[:, _FLOATS.index(name)]


class Drawn(NamedTuple):
  """Holds what was drawn."""

  token: jax.Array  # [R] int32
  logprob: jax.Array  # [R] float32, by the model alone
  sampled: jax.Array  # [R] float32, by what the token was drawn from
  sound: jax.Array  # [R] bool, False where logits were not finite
  top: jax.Array  # [R A] int32, the likeliest; 0 unless a row wants them
  top_logprob: jax.Array  # [R A] float32
  kept: jax.Array  # [R W] uint32, tokens it could be; [R 0] unless wanted


class Settings(NamedTuple):
  """Holds one row of `Draws` without what changes from step to step."""

  ints: np.ndarray
  floats: np.ndarray
  biased: np.ndarray
  bias: np.ndarray


def settings(request: Request, seed: int, vocab: int) -> Settings:
  """Returns how the tokens of a request's answer are drawn with a seed.

  Seeds count modulo 2**64.
  """
  how = request.sampling
  low, high = np.array([int(seed) % 2**64], np.uint64).view(np.int32)
  ints = how.top_k, len(request.prompt), low, high, request.logprobs or 0
  biased = np.full(BIASES, vocab, np.int32)
  bias = np.zeros(BIASES, np.float32)
  for k, (token, value) in enumerate(how.logit_bias):
    biased[k], bias[k] = token, value
  floats = [getattr(how, name) for name in _FLOATS]
  return Settings(
    np.array(ints, np.int32), np.array(floats, np.float32), biased, bias
  )


def words(vocab: int) -> int:
  """Returns how many int32 hold a bit for each token."""
  return -(-vocab // 32)


def pack(
  each: Sequence[Settings],
  allowed: Sequence[np.ndarray | None],
  history: np.ndarray,
  vocab: int,
) -> Draws:
  """Returns the settings of rows as arrays of the host.

  Args:
    each: of some rows; the rest are filled up with those of the first.
    allowed: [ceil(V / 32)] int32 of each, or None: all tokens are allowed.
    history: [R H] int32.
    vocab: V.
  """
  rows = len(history)
  each = [*each, *[each[0]] * (rows - len(each))]
  bits = np.full((rows, words(vocab)), -1, np.int32)
  for row, mask in zip(bits, allowed):
    if mask is not None:
      row[:] = mask
  return Draws(*map(np.stack, zip(*each)), bits, history)


def draw(
  logits: jax.Array, draws: Draws, length: jax.Array, *, kept: bool = False
) -> Drawn:
  """Draws the token at position `length` [R] of each row from logits [R V].

  With `kept` it also says what else the token could have been.
  """
  raw = logits
  target = restricted(adjusted(raw, draws, length), draws)
  sound = jnp.isfinite(raw).all(axis=-1) & (target.max(axis=-1) == 0)
  greedy = draws.float('temperature') == 0
  best = _first_of_largest(target)
  # Noise is made only where a row is not greedy.
  token = jax.lax.cond(
    greedy.all(),
    lambda: best,
    lambda: jnp.where(greedy, best, _noisy(target, draws, length)),
  )
  at = token[:, None]
  pick = lambda a: jnp.take_along_axis(a, at, axis=-1)[:, 0]
  norm = lambda a: jax.scipy.special.logsumexp(a, axis=-1)
  logprob = pick(raw) - norm(raw)
  sampled = jnp.where(greedy, 0.0, pick(target) - norm(target))
  top, top_logprob = likeliest(raw, draws.int('wants_top').max() > 0)
  words = kept_tokens.packed(target > -jnp.inf) if kept else _none_kept(token)
  return Drawn(token, logprob, sampled, sound, top, top_logprob, words)


def _none_kept(token: jax.Array) -> jax.Array:
  """Returns no word for each of some tokens [R]: [R 0] uint32."""
  return jnp.zeros((*token.shape, 0), jnp.uint32)


def likeliest(
  logits: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the TOP likeliest tokens [... A] and their log-probabilities.

  Zeros unless `wanted`.
  """
  most = min(TOP, logits.shape[-1])
  shape = (*logits.shape[:-1], most)

  def found() -> tuple[jax.Array, jax.Array]:
    value, at = jax.lax.top_k(logits, most)
    norm = jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return at.astype(jnp.int32), value - norm

  none = lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
  return jax.lax.cond(wanted, found, none)


def adjusted(logits: jax.Array, draws: Draws, length: jax.Array) -> jax.Array:
  """Returns logits [R V] after penalties, bias and grammar.

  Tokens that the grammar does not allow are at -inf.
  """
  V = logits.shape[-1]
  names = ('presence_penalty', 'frequency_penalty')
  none = draws.float('repetition_penalty') == 1
  for name in names:
    none &= draws.float(name) == 0
  logits = jax.lax.cond(
    none.all(),
    lambda: logits,
    lambda: _penalised(logits, draws, length),
  )

  def biased() -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, draws.biased].add(draws.bias, mode='drop')

  logits = jax.lax.cond((draws.biased < V).any(), biased, lambda: logits)

  def masked() -> jax.Array:
    bits = draws.allowed[:, jnp.arange(V) // 32] >> (jnp.arange(V) % 32)
    return jnp.where(bits & 1, logits, -jnp.inf)

  free = (draws.allowed == -1).all()
  return jax.lax.cond(free, lambda: logits, masked)


def _penalised(logits: jax.Array, draws: Draws, length: jax.Array) -> jax.Array:
  """Returns logits after the three penalties."""
  (R, V), (_, H) = logits.shape, draws.history.shape
  place = jnp.arange(H)
  there = place < length[:, None]
  answer = there & (place >= draws.int('prompt')[:, None])
  rows = jnp.arange(R)[:, None]
  count = lambda which: (
    jnp.zeros((R, V), jnp.float32)
    .at[rows, draws.history]
    .add(which.astype(jnp.float32), mode='drop')
  )
  factor = draws.float('repetition_penalty')[:, None]
  shrunk = jnp.where(logits > 0, logits / factor, logits * factor)
  logits = jnp.where(count(there) > 0, shrunk, logits)
  times = count(answer)
  logits -= draws.float('presence_penalty')[:, None] * (times > 0)
  return logits - draws.float('frequency_penalty')[:, None] * times


def restricted(logits: jax.Array, draws: Draws) -> jax.Array:
  """Returns logits [R V] after temperature and cuts; what is cut is at -inf.

  The largest is 0. Ties at a border go to the lower token.
  """
  # Below 0 first: a tiny temperature then gives -inf, never inf. One that
  # float32 can't hold would be 0.
  tiny = float(jnp.finfo(jnp.float32).tiny)
  temperature = jnp.maximum(draws.float('temperature'), tiny)[:, None]
  top = logits.max(axis=-1, keepdims=True)
  logits = (logits - top) / temperature
  V = logits.shape[-1]
  top_k, top_p = draws.int('top_k')[:, None], draws.float('top_p')[:, None]
  min_p = draws.float('min_p')[:, None]

  def cut() -> jax.Array:
    # Sort, decide in sorted order what stays, and scatter back.
    order = jnp.argsort(logits, axis=-1, descending=True)  # stable
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    keep = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)
    probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The first token always stays, were top_p 0 in float32; all do at 1,
    # whatever rounding says.
    keep &= (before < jnp.maximum(top_p, tiny)) | (top_p == 1)
    kept = jnp.where(keep, ordered, -jnp.inf)
    return jnp.put_along_axis(logits, order, kept, axis=-1, inplace=False)

  whole = ((top_k == 0) & (top_p == 1)).all()
  kept = jax.lax.cond(whole, lambda: logits, cut)
  # Tokens so likely as min_p of the likeliest, whose logit is 0.
  floor = jnp.where(min_p > 0, jnp.log(jnp.maximum(min_p, tiny)), -jnp.inf)
  return jnp.where(logits >= floor, kept, -jnp.inf)


def _noisy(logits: jax.Array, draws: Draws, length: jax.Array) -> jax.Array:
  """Draws a token of each row, [R] int32, by its seed and position."""

  def one(
    logits: jax.Array, low: jax.Array, high: jax.Array, at: jax.Array
  ) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(low), high)
    return jax.random.categorical(jax.random.fold_in(key, at), logits)

  seeds = draws.int('seed_low'), draws.int('seed_high')
  return jax.vmap(one)(logits, *seeds, length).astype(jnp.int32)


def _first_of_largest(logits: jax.Array) -> jax.Array:
  """Returns the first of the largest, [R] int32.

  As argmax, which is a slow loop on XLA:CPU.
  """
  V = logits.shape[-1]
  best = logits == logits.max(axis=-1, keepdims=True)
  return jnp.where(best, jnp.arange(V), V - 1).min(axis=-1).astype(jnp.int32)
