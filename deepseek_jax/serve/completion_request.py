"""Reads a request for /v1/completions: texts or tokens to go on from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.infer.request import Request
from deepseek_jax.serve import requests, response_format
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.json_fields import Fields, shown
from deepseek_jax.serve.requests import Common
from deepseek_jax.serve.served import Served

_DEFAULT = 16  # OpenAI's number of new tokens


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
  """Holds a request to go on from some prompts.

  Attributes:
    common: see there.
    requests: what the engine is asked for, one for each prompt.
    texts: the prompts as text, where they are echoed, else ''.
    echo: whether the answer begins with its prompt.
    logprobs: whether log-probabilities are told.
    silent: whether nothing new is wanted, only what there is to a prompt.
  """

  common: Common
  requests: tuple[Request, ...]
  texts: tuple[str, ...]
  echo: bool
  logprobs: bool
  silent: bool


def read(
  body: Mapping[str, Any], served: Served, limits: Limits, salt: str = ''
) -> CompletionRequest:
  """Returns what a body asks for.

  Args:
    body: of the request, parsed.
    served: the model.
    limits: of this server.
    salt: of prefix reuse, of the key that asks.

  Raises:
    ApiError: a field is wrong, unknown, or over a limit.
  """
  fields = Fields(body)
  common = requests.common(fields, served, limits)
  echo = fields.flag('echo')
  top = fields.integer('logprobs', None, 0, limits.top_logprobs)
  new = fields.integer('max_tokens', _DEFAULT, 0, limits.new_tokens)
  if not new and not echo:
    fields.fail('max_tokens', 'is 0, which needs echo = true')
  best = fields.integer('best_of', common.n, 1, limits.answers)
  if best != common.n:
    fields.fail('best_of', f'is {best}, must equal n = {common.n}')
  form = response_format.read(fields, served, limits)
  prompts = _prompts(fields, served, limits, echo)
  fields.close()
  _check_size(fields, prompts, common.n, limits, top if echo else None)
  grammar = form and form.grammar(served)
  scored = echo and top is not None
  out = []
  for i, (ids, _) in enumerate(prompts):
    # One token is drawn even where none is wanted, for the engine's sake.
    out.append(
      Request(
        prompt=tuple(ids),
        max_new_tokens=max(1, requests.room(ids, new, served, limits)),
        sampling=requests.seeded(common.sampling, i * common.n),
        n=common.n,
        stop_strings=common.stops,
        logprobs=top,
        echo=scored,
        grammar=grammar,
        salt=f'{salt}{common.salt}',
      )
    )
  texts = tuple(text for _, text in prompts)
  return CompletionRequest(
    common, tuple(out), texts, echo, top is not None, not new
  )


def _check_size(
  fields: Fields,
  prompts: list[tuple[list[int], str]],
  n: int,
  limits: Limits,
  top: int | None,
) -> None:
  """Raises ApiError for more answers or log-probabilities than are given.

  Args:
    fields: name what is wrong.
    prompts: (tokens, text) each.
    n: answers to each.
    limits: of this server.
    top: likeliest tokens beside each of the prompts'; None: nothing is told.
  """
  answers = len(prompts) * n
  if answers > limits.requests:
    fields.fail(
      'prompt',
      f'{len(prompts)} prompts with n = {n} are {answers} answers; at most'
      f' {limits.requests} are given at a time',
    )
  scores = 0 if top is None else (top + 1) * n * sum(len(p) for p, _ in prompts)
  if scores > limits.scores:
    fields.fail(
      'echo',
      f'{scores} log-probabilities; at most {limits.scores} are told at a'
      ' time: send fewer prompts or lower logprobs',
    )


def _prompts(
  fields: Fields, served: Served, limits: Limits, echo: bool
) -> list[tuple[list[int], str]]:
  """Returns (tokens, text if it is echoed) of every prompt."""
  found, suffix = fields.raw('prompt'), fields.text('suffix')
  if found is None:
    fields.fail('prompt', 'is missing')
  if suffix is not None:
    return [_infilled(fields, served, found, suffix, echo)]
  if isinstance(found, str) or _are_tokens(found):
    found = [found]
  if not isinstance(found, list) or not found:
    fields.fail(
      'prompt',
      f'is {shown(found)}, must be a string, a list of tokens, or a list of'
      ' such',
    )
  if len(found) > limits.prompts:
    message = f'has {len(found)} prompts; at most {limits.prompts} are taken'
    fields.fail('prompt', message)
  out = []
  for i, prompt in enumerate(found):
    if isinstance(prompt, str):
      out.append((served.prompt(prompt), prompt))
    elif _are_tokens(prompt):
      text = served.tokenizer.decode(prompt) if echo else ''
      out.append((list(prompt), text))
    else:
      fields.fail(
        'prompt', f'{shown(prompt)} at {i}: must be a string or tokens'
      )
  return out


def _are_tokens(value: Any) -> bool:
  """Returns whether a value is a list of token ids, not empty."""
  return (
    isinstance(value, list)
    and bool(value)
    and all(type(t) is int and 0 <= t < 1 << 31 for t in value)
  )


def _infilled(
  fields: Fields, served: Served, prompt: Any, suffix: str, echo: bool
) -> tuple[list[int], str]:
  """Returns the tokens after which the middle of a text is written."""
  if not served.tokenizer.fim:
    fields.fail('suffix', f'{served.name} has no fill-in-the-middle marks')
  if not isinstance(prompt, str):
    fields.fail('suffix', 'needs one prompt that is a string')
  if echo:
    fields.fail('suffix', 'cannot be echoed; leave echo out')
  return served.infill(prompt, suffix), ''
