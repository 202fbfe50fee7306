"""Samples tokens: prefill, then a jitted decode loop over the cache.

The model is the training model; only its layers are taken apart, so that a
step reads each weight where it lies instead of copying it out of a stack.
Legend: B rows, T prompt slots, N new tokens, V vocabulary.
"""

import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import at_least, within
from deepseek_jax.errors import InputError, told
from deepseek_jax.infer.prepared import build_flat, prepare
from deepseek_jax.model import given
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel import processor
from deepseek_jax.parallel.sharding import Using, current


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Describes how the next token is drawn.

  Attributes:
    temperature: 0 takes the likeliest token.
    top_k: draws among that many tokens (0: all).
    top_p: draws among the likeliest tokens that make up this probability.
    stop: a row ends after one of these tokens.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range or a wrong stop token."""
    at_least(self, temperature=0, top_k=0)
    within(self, top_p=(0, 1), ends='(]')
    each = self.stop if isinstance(self.stop, tuple) else (None,)
    if not all(isinstance(t, numbers.Integral) and t >= 0 for t in each):
      raise InputError(
        f'stop = {self.stop!r}: must be a tuple of token numbers, as (2,)'
      )


class Sampled(NamedTuple):
  """Holds what was drawn. `log_probs` are the model's: untempered, uncut."""

  tokens: np.ndarray  # [B N] int32
  lengths: np.ndarray  # [B] int32, tokens up to and including a stop token
  log_probs: np.ndarray  # [B N] float32 of each token


class _Row(NamedTuple):
  """Holds the state of the loop."""

  cache: Cache
  logits: jax.Array  # [B V] of the next token
  done: jax.Array  # [B] bool
  index: jax.Array  # int32, tokens drawn so far


def restrict(logits: jax.Array, cfg: SampleConfig) -> jax.Array:
  """Returns logits [B V] after temperature, top-k and top-p; the rest at -inf.

  The largest is 0. Ties at a border go to the lower token.
  """
  # Below 0 first: a tiny temperature then gives -inf, never inf. One that
  # float32 can't hold would be 0.
  temperature = max(cfg.temperature, float(jnp.finfo(jnp.float32).tiny))
  logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
  if not cfg.top_k and cfg.top_p == 1:
    return logits
  V = logits.shape[-1]
  # Sort, decide in sorted order what stays, and scatter back.
  order = jnp.argsort(logits, axis=-1, descending=True)  # stable
  ordered = jnp.take_along_axis(logits, order, axis=-1)
  keep = jnp.arange(V) < (cfg.top_k or V)
  if cfg.top_p < 1:
    probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = keep & (before < cfg.top_p)  # the first token always stays
  cut = jnp.where(keep, ordered, -jnp.inf)
  return jnp.put_along_axis(logits, order, cut, axis=-1, inplace=False)


def draw(
  logits: jax.Array, key: jax.Array, index: jax.Array, cfg: SampleConfig
) -> jax.Array:
  """Returns the next tokens [B] int32 of logits [B V].

  A row's randomness depends on the key, the row and the index alone.
  """
  if cfg.temperature == 0:
    # The first of the largest, as argmax, which is a slow loop on XLA:CPU.
    V = logits.shape[-1]
    best = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(best, jnp.arange(V), V - 1).min(axis=-1).astype(jnp.int32)
  rows = jnp.arange(logits.shape[0])
  # One key per row and index, whatever B is and however often it is called.
  keys = jax.vmap(lambda r: jax.random.fold_in(key, r))(rows)
  keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
  drawn = jax.vmap(jax.random.categorical)(keys, restrict(logits, cfg))
  return drawn.astype(jnp.int32)


class _Loop(NamedTuple):
  """Holds the jitted pieces for one model and one SampleConfig."""

  prefill: ...  # (variables, tokens [B T], lengths [B], slots) -> _Row
  step: ...  # (variables, _Row, key) -> (_Row, token [B], log_prob [B])
  decode: ...  # (variables, _Row, key, N) -> tokens [B N], log_probs [B N]


@functools.lru_cache(maxsize=32)
def _loop(model: Model, cfg: SampleConfig, using: Using | None) -> _Loop:
  """Returns the jitted pieces; a cache of them spares compilations."""
  del using  # what is traced depends on it, which jit does not know
  flat = build_flat(model)

  def prefill(
    variables: dict, tokens: jax.Array, lengths: jax.Array, slots: int
  ) -> _Row:
    B, T = tokens.shape
    # Padding is segment 0, which nothing attends to.
    valid = jnp.arange(T) < lengths[:, None]
    out = flat.apply(
      variables,
      tokens,
      positions=jnp.broadcast_to(jnp.arange(T), (B, T)),
      segment_ids=valid.astype(jnp.int32),
      cache=flat.init_cache(B, slots),
    )
    # [B T D] -> [B D]: the last real token of each prompt predicts the next.
    hidden = jnp.take_along_axis(
      out.hidden, (lengths - 1)[:, None, None], axis=1
    )[:, 0]
    logits = jnp.einsum(
      'BD,DV->BV',
      hidden,
      flat.head(variables),
      preferred_element_type=jnp.float32,
    )
    return _Row(out.cache, logits, jnp.zeros(B, bool), jnp.int32(0))

  def step(
    variables: dict, row: _Row, key: jax.Array
  ) -> tuple[_Row, jax.Array, jax.Array]:
    # Draw from the logits at hand, then run the model on the new token.
    token = draw(row.logits, key, row.index, cfg)
    # The model's own log-probabilities, before temperature and top-k.
    log_prob = jnp.take_along_axis(
      jax.nn.log_softmax(row.logits), token[:, None], axis=-1
    )[:, 0]
    # [B 1] through the model; the cache has all tokens before.
    out = flat.apply(variables, token[:, None], cache=row.cache)
    stops = jnp.asarray(cfg.stop, jnp.int32)
    # A row that is done goes on being computed, until all rows are.
    done = row.done | (token[:, None] == stops).any(axis=-1)
    row = _Row(out.cache, out.logits[:, 0], done, row.index + 1)
    return row, token, log_prob

  def decode(
    variables: dict, row: _Row, key: jax.Array, count: int
  ) -> tuple[jax.Array, jax.Array]:
    # [N B]: a step writes one row, and ends early leave zeros.
    tokens = jnp.zeros((count, row.logits.shape[0]), jnp.int32)
    log_probs = jnp.zeros(tokens.shape, jnp.float32)

    def body(
      state: tuple[_Row, jax.Array, jax.Array],
    ) -> tuple[_Row, jax.Array, jax.Array]:
      row, tokens, log_probs = state
      new, token, log_prob = step(variables, row, key)
      at = row.index
      return new, tokens.at[at].set(token), log_probs.at[at].set(log_prob)

    going = lambda s: (s[0].index < count) & ~s[0].done.all()
    state = jax.lax.while_loop(going, body, (row, tokens, log_probs))
    return state[1].T, state[2].T

  xla = model.config.compute.xla
  how = lambda program: processor.options(program, xla)
  return _Loop(
    jax.jit(prefill, static_argnums=3, compiler_options=how('prefill')),
    jax.jit(step, donate_argnums=1, compiler_options=how('decode')),
    jax.jit(decode, static_argnums=3, compiler_options=how('decode')),
  )


def _padded(prompt: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts as one right-padded array [B T] and their lengths [B].

  T is rounded up, so that prompts of similar length share a compilation.
  """
  rows = [_row(row) for row in prompt]
  if not rows or min(len(row) for row in rows) == 0:
    raise InputError('prompt: needs at least one row, each with a token')
  lengths = np.array([len(row) for row in rows], np.int32)
  # Right-padded to a multiple of 32 tokens.
  out = np.zeros((len(rows), -(-lengths.max() // 32) * 32), np.int32)
  for padded, row in zip(out, rows):
    padded[: len(row)] = row
  return out, lengths


def _row(row: Sequence[int]) -> np.ndarray:
  """Returns one prompt, [T] int32; InputError if it is no row of token ids."""
  array = np.asarray(row)
  if array.size and (array.ndim != 1 or array.dtype.kind not in 'iu'):
    raise InputError(
      f'prompt: {row!r} is no row of token ids; give rows, as [[1, 2, 3]]'
    )
  # Clipped: 2^32 + 5 must not become 5.
  return np.clip(array, -(2**31), 2**31 - 1).astype(np.int32)


def _started(
  model: Model,
  variables: dict,
  prompt: Sequence[Sequence[int]],
  cfg: SampleConfig,
  new: int,
  slots: int | None,
) -> tuple[_Loop, dict, _Row]:
  """Checks a request and prefills the cache.

  Returns:
    The jitted pieces, the prepared variables, and the state after the prompts.
  """
  if not isinstance(model, Model):
    raise InputError(
      f'model: is {told(model)}, no Model; ds.build(config) makes one'
    )
  tokens, lengths = _padded(prompt)
  given.sizes(max_new_tokens=new, **({} if slots is None else {'slots': slots}))
  unknown = tokens[(tokens < 0) | (tokens >= model.config.vocab_size)]
  if unknown.size:
    raise InputError(
      f'prompt: token {unknown[0]} is outside the vocabulary of'
      f' {model.config.vocab_size}'
    )
  least = max(int(lengths.max()) + new, tokens.shape[1])
  # The cache holds prompt and new tokens, in pages of 64 as kernels read it.
  slots = slots or -(-least // 64) * 64
  if slots < least:
    raise InputError(
      f'slots = {slots}: {lengths.max()} prompt and {new} new tokens need'
      f' {least}; raise slots or lower max_new_tokens'
    )
  _check_room(model, len(tokens), slots, new)
  loop = _loop(model, cfg, current())
  variables = prepare(model, variables)
  return loop, variables, loop.prefill(variables, tokens, lengths, slots)


def _check_room(model: Model, rows: int, slots: int, new: int) -> None:
  """Raises InputError where the cache alone is more than the device holds."""
  # Shapes must fit int32; the cache grows linearly with the length.
  tried = min(slots, 1 << 20)
  need = _cache_bytes(model, rows, tried) * slots / tried
  room = _room()
  if need > room:
    raise InputError(
      f'max_new_tokens = {new}: the cache of {rows} x {slots} tokens takes'
      f' {need / 2**30:.1f} GiB, of {room / 2**30:.1f} that the device has;'
      ' lower it, or give fewer or shorter prompts'
    )


@functools.lru_cache(maxsize=32)
def _cache_bytes(model: Model, rows: int, slots: int) -> int:
  """Returns the bytes of a cache of `rows` x `slots` tokens."""
  shapes = jax.eval_shape(lambda: build_flat(model).init_cache(rows, slots))
  leaves = jax.tree.leaves(shapes)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _room() -> float:
  """Returns the bytes of the device's memory; inf where it does not say."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if device.platform != 'cpu':
    return stats.get('bytes_limit', math.inf)
  try:
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, OSError, ValueError):  # no POSIX system
    return math.inf


def sample(
  model: Model,
  variables: dict,
  prompt: Sequence[Sequence[int]],
  cfg: SampleConfig = SampleConfig(),
  *,
  max_new_tokens: int,
  key: jax.Array | None = None,
  slots: int | None = None,
) -> Sampled:
  """Draws continuations of prompts of any lengths.

  Args:
    model, variables: the model, as it trains.
    prompt: B rows of token ids.
    cfg: how tokens are drawn.
    max_new_tokens: N.
    key: of the draws, or its seed; may be None when the temperature is 0.
    slots: length of the cache; by default what the longest row needs.

  Raises:
    InputError: an empty prompt, an unknown token, a cache too short; or
      variables of another model.
  """
  key = _checked_key(key, cfg)
  loop, variables, row = _started(
    model, variables, prompt, cfg, max_new_tokens, slots
  )
  tokens, log_probs = loop.decode(variables, row, key, max_new_tokens)
  tokens = np.asarray(tokens)
  stops = np.isin(tokens, np.array(cfg.stop, np.int32))
  # A row's length ends with its first stop token; else it has all N.
  first = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, len(tokens.T))
  return Sampled(tokens, first.astype(np.int32), np.asarray(log_probs))


def generate(
  model: Model,
  variables: dict,
  prompt: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  stop: Sequence[int] = (),
  key: jax.Array | None = None,
) -> list[list[int]]:
  """Returns each row's new tokens, the stop token that ended it included."""
  stop = tuple(stop) if isinstance(stop, Sequence) else stop
  cfg = SampleConfig(temperature, top_k, top_p, stop)
  out = sample(
    model, variables, prompt, cfg, max_new_tokens=max_new_tokens, key=key
  )
  return [row[:n].tolist() for row, n in zip(out.tokens, out.lengths)]


def stream(
  model: Model,
  variables: dict,
  prompt: Sequence[Sequence[int]],
  cfg: SampleConfig = SampleConfig(),
  *,
  max_new_tokens: int,
  key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
  """Yields the next token of every row, [B] int32, as it is drawn.

  Ends when each row has met a stop token; a row that has goes on till then.
  """
  key = _checked_key(key, cfg)
  loop, variables, row = _started(
    model, variables, prompt, cfg, max_new_tokens, None
  )
  for _ in range(max_new_tokens):
    row, token, _ = loop.step(variables, row, key)
    yield np.asarray(token)
    if bool(row.done.all()):
      return


def _checked_key(key: jax.Array | int | None, cfg: SampleConfig) -> jax.Array:
  """Returns the key of the draws; InputError if one is needed and missing."""
  if key is None and cfg.temperature > 0:
    raise InputError('key: sampling at a temperature above 0 needs one')
  return given.random_key(0 if key is None else key)
