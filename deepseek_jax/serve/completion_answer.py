"""Writes what goes on from prompts: whole, or as chunks of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from deepseek_jax.infer.request import Event
from deepseek_jax.serve import heat, refusals, wire
from deepseek_jax.serve.completion_request import CompletionRequest
from deepseek_jax.serve.generation import Generation
from deepseek_jax.serve.logprobs import Legacy
from deepseek_jax.serve.served import Served


class _Choice:
  """Follows one answer to one prompt."""

  def __init__(self, asked: CompletionRequest, served: Served, place: int):
    """Starts with the prompt, if it is echoed."""
    self._asked, self._served = asked, served
    self._prompt = asked.requests[place].prompt
    self._new = asked.texts[place] if asked.echo else ''
    self._told = Legacy(served) if asked.logprobs else None
    self._started = False
    self.text, self.finish = '', None

  def take(self, event: Event) -> None:
    """Takes what the engine gave."""
    if not self._started:
      self._started = True
      if self._told is not None and self._asked.echo:
        self._echo(event)
    if self._asked.silent:
      self.finish = self.finish or 'length'
      return
    if event.finish in ('cancelled', 'error'):
      raise refusals.broken(event.error or f'the answer was {event.finish}')
    if self._told is not None:
      for token, told in zip(event.tokens, event.logprobs):
        self._told.add(token, told, hidden=token in self._served.stop)
    self._new += event.text
    self.finish = event.finish

  def _echo(self, event: Event) -> None:
    """Tells about the prompt's tokens."""
    begins = self._served.boundaries.begins
    for i, token in enumerate(self._prompt):
      told = event.prompt_logprobs[i] if event.prompt_logprobs else None
      hidden = i < len(begins) and token == begins[i]
      self._told.add(token, told, hidden=hidden)

  def give(self, index: int) -> dict[str, Any]:
    """Returns what came since the last call, as the API writes it."""
    new, self._new = self._new, ''
    self.text += new
    told = None
    if self._told is not None:
      told = self._told.lists
      self._told.clear()
    return {
      'index': index,
      'text': new,
      'logprobs': told,
      'finish_reason': self.finish,
    }


class Completions:
  """Writes all answers to one request."""

  def __init__(self, asked: CompletionRequest, served: Served, got: Generation):
    """Takes what was asked, the model, and what it generates."""
    self._asked, self._got = asked, got
    self._choices = [
      _Choice(asked, served, place)
      for place in range(len(asked.requests))
      for _ in range(asked.common.n)
    ]
    self._head = {
      'id': f'cmpl-{uuid.uuid4().hex}',
      'object': 'text_completion',
      'created': int(time.time()),
      'model': served.name,
      'system_fingerprint': served.fingerprint,
    }

  def _tail(self) -> dict[str, Any]:
    """Returns the numbers of tokens, and the experts' load if asked for."""
    new = 0 if self._asked.silent else self._got.completion_tokens
    out = {'usage': self._got.usage(new)}
    if self._asked.common.load:
      out['expert_load'] = heat.load(self._got.load)
    return out

  async def whole(self) -> Response:
    """Returns the response when all answers have ended."""
    n = self._asked.common.n
    async for items in self._got:
      for item in items:
        self._choices[item.place * n + item.event.index].take(item.event)
    choices = [choice.give(i) for i, choice in enumerate(self._choices)]
    return wire.answer({**self._head, 'choices': choices, **self._tail()})

  async def chunks(self) -> AsyncGenerator[bytes, None]:
    """Yields the chunks of the stream as JSON."""
    n, usage = self._asked.common.n, self._asked.common.usage
    head = self._head | ({'usage': None} if usage else {})
    async for items in self._got:
      for item in items:
        at = item.place * n + item.event.index
        choice = self._choices[at]
        if choice.finish is not None:
          continue
        choice.take(item.event)
        given = choice.give(at)
        if given['text'] or given['finish_reason'] or given['logprobs']:
          yield wire.to_json({**head, 'choices': [given]})
    if usage or self._asked.common.load:
      tail = self._tail()
      if not usage:
        tail.pop('usage')
      yield wire.to_json({**head, 'choices': [], **tail})
