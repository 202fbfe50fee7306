"""Reads what both ways of asking share: sampling, stops, streaming."""

import dataclasses
import secrets
from typing import Any

from deepseek_jax.infer.request import Sampling
from deepseek_jax.serve import refusals
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.json_fields import Fields
from deepseek_jax.serve.served import Served

# Documented by OpenAI; they change no answer here.
WITHOUT_EFFECT = (
  'metadata',
  'prompt_cache_key',
  'prompt_cache_retention',
  'safety_identifier',
  'service_tier',
  'store',
  'user',
)


@dataclasses.dataclass(frozen=True)
class Common:
  """Holds the fields that both ways of asking share.

  Attributes:
    sampling: how tokens are drawn.
    n: answers to a prompt.
    stops: texts that end an answer.
    stream: whether the answer comes in pieces.
    usage: whether a last piece tells the numbers of tokens.
    salt: of prefix reuse.
    load: whether the experts' load is told.
  """

  sampling: Sampling
  n: int
  stops: tuple[str, ...]
  stream: bool
  usage: bool
  salt: str
  load: bool


def common(fields: Fields, served: Served, limits: Limits) -> Common:
  """Returns the shared fields; ApiError names one that is wrong."""
  check_model(fields.text('model'), served)
  stream = fields.flag('stream')
  out = Common(
    sampling=_sampling(fields, served, limits),
    n=fields.integer('n', 1, 1, limits.answers),
    stops=_stops(fields, limits),
    stream=stream,
    usage=_usage(fields, stream),
    salt=fields.text('cache_salt', '', most=256),
    load=fields.flag('expert_load'),
  )
  fields.without_effect(WITHOUT_EFFECT)
  return out


def check_model(name: str | None, served: Served) -> None:
  """Raises ApiError if a request names another model."""
  if name not in (None, '', served.name):
    raise refusals.ApiError(
      404,
      f'model: this server has no {name[:60]!r}; it has {served.name!r}',
      param='model',
      code='model_not_found',
    )


def _sampling(fields: Fields, served: Served, limits: Limits) -> Sampling:
  """Returns how tokens are drawn; without a seed, by one of its own."""
  top_p = fields.number('top_p', 1.0, 0.0, 1.0)
  if top_p == 0:
    fields.fail('top_p', 'is 0, must be above 0; temperature 0 is greedy')
  penalty = fields.number('repetition_penalty', 1.0, 0.0, 10.0)
  if penalty == 0:
    fields.fail('repetition_penalty', 'is 0, must be above 0')
  seed = fields.integer('seed', None, -(2**63), 2**63 - 1)
  return Sampling(
    temperature=fields.number('temperature', 1.0, 0.0, 2.0),
    top_k=max(0, fields.integer('top_k', 0, -1, served.vocab_size)),
    top_p=top_p,
    min_p=fields.number('min_p', 0.0, 0.0, 1.0),
    repetition_penalty=penalty,
    presence_penalty=fields.number('presence_penalty', 0.0, -2.0, 2.0),
    frequency_penalty=fields.number('frequency_penalty', 0.0, -2.0, 2.0),
    logit_bias=_biases(fields, served, limits),
    seed=secrets.randbits(32) if seed is None else seed,
    stop=served.stop,
  )


def _biases(
  fields: Fields, served: Served, limits: Limits
) -> tuple[tuple[int, float], ...]:
  """Returns (token, what is added to its logit) of each biased token."""
  inner = fields.inner('logit_bias')
  if inner is None:
    return ()
  names = inner.names()
  if len(names) > limits.biases:
    message = f'has {len(names)} tokens; at most {limits.biases} are taken'
    fields.fail('logit_bias', message)
  out = {}
  for name in names:
    number = len(name) < 10 and name.isascii() and name.isdigit()
    token = int(name) if number else -1
    if not 0 <= token < served.vocab_size:
      fields.fail(
        'logit_bias',
        f'{name[:20]!r} is no token; write ids from 0 to'
        f' {served.vocab_size - 1} as strings',
      )
    out[token] = inner.number(name, None, -100, 100)
  return tuple(sorted(out.items()))


def _stops(fields: Fields, limits: Limits) -> tuple[str, ...]:
  """Returns the texts that end an answer."""
  found = fields.raw('stop')
  if found is None:
    return ()
  texts = [found] if isinstance(found, str) else found
  if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
    fields.fail('stop', 'must be a string or a list of strings')
  if len(texts) > limits.stops:
    message = f'has {len(texts)} texts; at most {limits.stops} are taken'
    fields.fail('stop', message)
  for text in texts:
    if not 0 < len(text) <= limits.stop_length:
      fields.fail(
        'stop',
        f'a text of {len(text)} characters; each must have 1 to'
        f' {limits.stop_length}',
      )
  return tuple(dict.fromkeys(texts))


def _usage(fields: Fields, stream: bool) -> bool:
  """Returns whether the stream ends by the numbers of tokens."""
  if not stream and fields.has('stream_options'):
    fields.fail('stream_options', 'needs stream = true')
  options = fields.inner('stream_options')
  if options is None:
    return False
  wanted = options.flag('include_usage')
  options.without_effect(('include_obfuscation',))
  options.close()
  return wanted


def room(
  prompt: list[int], wanted: int | None, served: Served, limits: Limits
) -> int:
  """Returns how many tokens may follow a prompt.

  Args:
    prompt: its tokens.
    wanted: as the request has it; None: as many as fit.
    served: with the context.
    limits: of this server.

  Raises:
    ApiError: nothing fits behind the prompt, or a token is unknown.
  """
  if not prompt:
    raise refusals.wrong('prompt', 'is empty; give at least one token')
  left = served.context - len(prompt)
  if left < 1:
    raise refusals.ApiError(
      400,
      f'the prompt has {len(prompt)} tokens; this model takes'
      f' {served.context - 1} and writes what is left of {served.context}:'
      ' shorten it',
      param='prompt',
      code='context_length_exceeded',
    )
  for token in prompt:
    if not 0 <= token < served.vocab_size:
      raise refusals.wrong(
        'prompt',
        f'token {token} is unknown; ids go from 0 to {served.vocab_size - 1}',
      )
  return min(left, limits.new_tokens if wanted is None else wanted)


def seeded(sampling: Sampling, offset: int) -> Sampling:
  """Returns the sampling of another prompt of the same request."""
  return dataclasses.replace(sampling, seed=sampling.seed + offset)


def nesting(value: Any, most: int) -> int:
  """Returns how deep objects and lists are nested, up to `most` + 1."""
  depth, level = 0, [value]
  while level and depth <= most:
    level = [
      inner
      for outer in level
      if isinstance(outer, dict | list)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
    depth += 1
  return depth
