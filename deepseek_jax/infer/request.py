"""Describes what an engine is asked for, and what it gives back.

Token ids are ints of the model's vocabulary; log-probabilities are nats.
"""

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

import numpy as np

from deepseek_jax.config import above, at_least, within
from deepseek_jax.errors import InputError, check_type

_NO_ROWS = str, bytes, Mapping, Set
_LARGEST = float(np.finfo(np.float32).max)
Finish = Literal['stop', 'length', 'cancelled', 'error']


def _whole(value: Any) -> bool:
  """Returns whether a value is a whole number."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _token(value: Any) -> bool:
  """Returns whether a value may be a token's number."""
  return _whole(value) and value >= 0


def _check_finite(name: str, value: Any) -> None:
  """Raises InputError unless a value is a number that float32 can hold."""
  fine = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not fine or not abs(value) <= _LARGEST:  # NaN is refused, too
    raise InputError(f'{name} = {value!r}: must be a finite number, of 32 bits')


def _tokens(given: Any) -> tuple[int, ...]:
  """Returns token numbers that a sequence or an array holds.

  Raises:
    InputError: it is no row of whole numbers; none is rounded, and no text is
      read as one.
  """
  row = None
  if hasattr(given, '__array__'):
    array = np.asarray(given)
    # An empty array is an empty prompt, whatever its dtype.
    if array.ndim == 1 and (array.dtype.kind in 'iu' or not array.size):
      row = array.tolist()
  elif isinstance(given, Iterable) and not isinstance(given, _NO_ROWS):
    row = [t.item() if getattr(t, 'shape', None) == () else t for t in given]
  if row is None or not all(map(_whole, row)):
    raise InputError(f'prompt = {given!r}: must be one row of token numbers')
  return tuple(map(int, row))


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Describes how the tokens of a request are drawn.

  In this order: the three penalties, `logit_bias`, the grammar, `temperature`,
  `top_k`, `top_p`, `min_p`.

  Attributes:
    temperature: 0 takes the likeliest token.
    top_k: draws among that many tokens (0: all).
    top_p: draws among the likeliest tokens that make up this probability.
    min_p: draws among tokens at least so likely as this share of the likeliest.
    repetition_penalty: divides positive logits of tokens that the prompt or the
      answer has, and multiplies negative ones.
    presence_penalty: subtracted from logits of tokens that the answer has.
    frequency_penalty: subtracted once for each time that the answer has it.
    logit_bias: pairs (token, added to its logit).
    seed: with a token's position it alone decides what is drawn.
    stop: tokens that end an answer.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  seed: int = 0
  stop: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    """Raises InputError for a field out of its range."""
    at_least(self, temperature=0, top_k=0)
    within(self, top_p=(0, 1), ends='(]')
    within(self, min_p=(0, 1), ends='[]')
    above(self, repetition_penalty=0)
    for name in ('presence_penalty', 'frequency_penalty'):
      _check_finite(name, getattr(self, name))
    for pair in self.logit_bias:
      if not (isinstance(pair, tuple) and len(pair) == 2 and _token(pair[0])):
        raise InputError(
          f'logit_bias = {pair!r}: must be pairs (token number, added logit)'
        )
      _check_finite('logit_bias', pair[1])
    if not isinstance(self.stop, tuple) or not all(map(_token, self.stop)):
      raise InputError(
        f'stop = {self.stop!r}: must be a tuple of token numbers'
      )
    if not _whole(self.seed):
      raise InputError(f'seed = {self.seed!r}: must be a whole number')
    if not -(2**63) <= self.seed < 2**64:
      raise InputError(f'seed = {self.seed}: must fit in 64 bits')

  @property
  def penalised(self) -> bool:
    """Returns whether tokens seen before count."""
    rest = self.presence_penalty, self.frequency_penalty
    return self.repetition_penalty != 1 or rest != (0, 0)


@dataclasses.dataclass(frozen=True)
class Request:
  """Describes a prompt and what is wanted after it.

  Attributes:
    prompt: token ids.
    max_new_tokens: at most so many tokens an answer.
    sampling: how they are drawn.
    n: answers; that of number i is drawn with seed + i, modulo 2**64.
    stop_strings: an answer's text ends before one of these (needs the
      engine's tokenizer).
    logprobs: None, or how many of the likeliest tokens are given beside each.
    echo: gives the log-probabilities of the prompt too.
    grammar: what the answer must match, see `infer.grammar`.
    salt: only requests of the same salt share cached prefixes.
    routes: gives the experts of every token (needs engine.routing).
    kept: gives which tokens each draw could have taken (needs engine.kept).
  """

  prompt: tuple[int, ...]
  max_new_tokens: int = 128
  sampling: Sampling = Sampling()
  n: int = 1
  stop_strings: tuple[str, ...] = ()
  logprobs: int | None = None
  echo: bool = False
  grammar: Any = None
  salt: str = ''
  routes: bool = False
  kept: bool = False

  def __post_init__(self) -> None:
    """Raises InputError for a field out of its range."""
    object.__setattr__(self, 'prompt', _tokens(self.prompt))
    if not self.prompt:
      raise InputError('prompt = (): must have at least one token')
    at_least(self, max_new_tokens=1, n=1)
    check_type('sampling', self.sampling, Sampling, 'as ds.Sampling(0.7)')
    if self.logprobs is not None:
      at_least(self, logprobs=0)
    texts = self.stop_strings
    if not isinstance(texts, tuple) or not all(
      isinstance(text, str) and text for text in texts
    ):
      raise InputError(
        f'stop_strings = {texts!r}: must be a tuple of texts, none empty'
      )


@dataclasses.dataclass(frozen=True)
class LogProb:
  """Holds how likely a token was.

  Attributes:
    token: which.
    logprob: by the model alone: before penalties, temperature and cuts.
    sampled: by the distribution it was drawn from; 0 at temperature 0.
    top: the likeliest tokens and their log-probabilities by the model.
  """

  token: int
  logprob: float
  sampled: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
  """Counts the tokens of one answer.

  Attributes:
    prompt_tokens: of the prompt.
    cached_tokens: of these, how many a shared prefix spared.
    completion_tokens: of the answer, its stop token included.
    accepted_drafts, rejected_drafts: of speculation.
  """

  prompt_tokens: int
  cached_tokens: int
  completion_tokens: int
  accepted_drafts: int = 0
  rejected_drafts: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
  """Holds what one step gave to one answer.

  Attributes:
    request, index: which request, and which of its answers.
    tokens: new tokens; the last one may be the stop token.
    text: what became certain of the answer's text; '' without a tokenizer.
    logprobs: of the tokens, if asked for.
    finish: why the answer ended; None if it goes on.
    error: what went wrong, with finish = 'error'.
    usage: with the last event.
    prompt_logprobs: with echo, of the prompt's tokens, with the first event;
      the first token has none.
    routes: [n L K] int16 or int32 with the last event, if asked for: of the
      prompt's tokens and the answer's the experts of each layer that has some;
      -1 where none was computed, as for the last token and a shared prefix.
    kept: [m W] uint32 of the answer's tokens that this step gave, if asked for,
      see `infer.kept_tokens`.
  """

  request: int
  index: int
  tokens: tuple[int, ...] = ()
  text: str = ''
  logprobs: tuple[LogProb, ...] = ()
  finish: Finish | None = None
  error: str | None = None
  usage: Usage | None = None
  prompt_logprobs: tuple[LogProb | None, ...] = ()
  routes: np.ndarray | None = None
  kept: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
  """Holds one whole answer; fields as in `Event`."""

  tokens: tuple[int, ...]
  text: str
  logprobs: tuple[LogProb, ...]
  finish: Finish
  error: str | None
  usage: Usage
  prompt_logprobs: tuple[LogProb | None, ...] = ()
  routes: np.ndarray | None = None
  kept: np.ndarray | None = None


def answer(events: list[Event]) -> Answer:
  """Joins the events of one answer; the last one has its `finish`."""
  last = events[-1]
  first = next((e.prompt_logprobs for e in events if e.prompt_logprobs), ())
  kept = [e.kept for e in events if e.kept is not None]
  return Answer(
    tuple(t for e in events for t in e.tokens),
    ''.join(e.text for e in events),
    tuple(p for e in events for p in e.logprobs),
    last.finish,
    last.error,
    last.usage,
    first,
    last.routes,
    np.concatenate(kept) if kept else None,
  )
