"""Reads a request for /v1/chat/completions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.infer.dialect import Chat
from deepseek_jax.infer.request import Request
from deepseek_jax.serve import (
  messages,
  refusals,
  requests,
  response_format,
)
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.json_fields import Fields
from deepseek_jax.serve.requests import Common
from deepseek_jax.serve.served import Served

EFFORTS = ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max')


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  """Holds a request for an answer in a conversation.

  Attributes:
    common: see there.
    chat: what is answered.
    request: what the engine is asked for.
    logprobs: whether the tokens' log-probabilities are told.
    parallel: whether an answer may have several calls.
  """

  common: Common
  chat: Chat
  request: Request
  logprobs: bool
  parallel: bool


def read(
  body: Mapping[str, Any], served: Served, limits: Limits, salt: str = ''
) -> ChatRequest:
  """Returns what a body asks for.

  Args:
    body: of the request, parsed.
    served: the model.
    limits: of this server.
    salt: of prefix reuse, of the key that asks.

  Raises:
    ApiError: a field is wrong, unknown, or over a limit.
  """
  if served.dialect is None:
    raise refusals.ApiError(
      400,
      f'{served.name} has no chat format: it goes on from texts; ask'
      ' /v1/completions',
      code='no_chat_format',
    )
  fields = Fields(body)
  common = requests.common(fields, served, limits)
  form = response_format.read(fields, served, limits)
  chat, parallel = _chat(fields, served, limits)
  if form is not None and chat.tools:
    fields.fail('response_format', 'cannot be had together with tools')
  if form is not None and form.kind != 'regex':  # formats know JSON's
    chat = dataclasses.replace(chat, form=body['response_format'])
  wanted = _new_tokens(fields, limits)
  top = _logprobs(fields, limits)
  for name, only in (('modalities', ['text']), ('prediction', None)):
    if fields.raw(name) not in (None, only):
      fields.fail(name, 'is not offered here; leave it out')
  fields.choice('verbosity', None, ('medium',))
  fields.close()
  try:
    prompt = served.dialect.encode(chat)
  except InputError as error:
    raise messages.at_message(error) from None
  request = Request(
    prompt=tuple(prompt),
    max_new_tokens=requests.room(prompt, wanted, served, limits),
    sampling=common.sampling,
    n=common.n,
    logprobs=top,
    grammar=form and _grammar(form, chat, prompt, served),
    salt=f'{salt}{common.salt}',
  )
  return ChatRequest(common, chat, request, top is not None, parallel)


def _grammar(
  form: response_format.AnswerForm,
  chat: Chat,
  prompt: list[int],
  served: Served,
) -> Any:
  """Returns the grammar of an answer, behind its thinking if it thinks."""
  dialect = served.dialect
  thinking = dialect.parser(chat, prompt, ()).state == 'reasoning'
  return form.grammar(served, dialect.end_of_thinking if thinking else None)


def _chat(fields: Fields, served: Served, limits: Limits) -> tuple[Chat, bool]:
  """Returns the conversation, and whether calls may be several."""
  said = messages.read(fields, limits)
  tools = messages.tools(fields, limits)
  if tools.functions and not served.dialect.calls:
    fields.fail('tools', f'{served.name} has no format for calls; leave it out')
  thinking, effort = _thinking(fields, served)
  chat = Chat(
    said,
    tools.functions,
    tools.choice,
    tools.function,
    thinking,
    effort,
  )
  return chat, tools.parallel


def _thinking(fields: Fields, served: Served) -> tuple[bool | None, str | None]:
  """Returns whether to think and how much, by any of the names in use.

  DeepSeek: {"thinking": {"type": "enabled"}}; vLLM and SGLang:
  chat_template_kwargs; OpenAI: reasoning_effort.
  """
  found = {}
  inner = fields.inner('thinking')
  if inner is not None:
    kind = inner.choice('type', None, ('enabled', 'disabled', 'adaptive'))
    inner.close()
    if kind in ('enabled', 'disabled'):
      found['thinking'] = kind == 'enabled'
  effort = fields.choice('reasoning_effort', None, EFFORTS)
  if effort == 'none':
    found['reasoning_effort'], effort = False, None
  inner = fields.inner('chat_template_kwargs')
  if inner is not None:
    for name in ('thinking', 'enable_thinking'):
      if inner.has(name):
        found[f'chat_template_kwargs.{name}'] = inner.flag(name)
    inner.close()
  if len(set(found.values())) > 1:
    fields.fail(next(iter(found)), f'says otherwise than {list(found)[-1]}')
  thinking = next(iter(found.values()), None)
  if thinking and served.dialect.end_of_thinking is None:
    fields.fail(next(iter(found)), f'{served.name} does not think')
  return thinking, effort


def _new_tokens(fields: Fields, limits: Limits) -> int | None:
  """Returns the most tokens of an answer, or None if it is left open."""
  names = ('max_completion_tokens', 'max_tokens')
  found = [fields.integer(name, None, 1, limits.new_tokens) for name in names]
  given = [number for number in found if number is not None]
  if len(set(given)) > 1:
    fields.fail('max_tokens', 'says otherwise than max_completion_tokens')
  return given[0] if given else None


def _logprobs(fields: Fields, limits: Limits) -> int | None:
  """Returns how many likeliest tokens are told beside each; None: nothing."""
  wanted = fields.flag('logprobs')
  top = fields.integer('top_logprobs', None, 0, limits.top_logprobs)
  if top is not None and not wanted:
    fields.fail('top_logprobs', 'needs logprobs = true')
  return (top or 0) if wanted else None
