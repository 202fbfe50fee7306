"""Writes answers in a conversation: whole, or as chunks of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.responses import Response

from deepseek_jax.infer.dialect import Delta
from deepseek_jax.infer.request import Event, LogProb
from deepseek_jax.serve import heat, logprobs, refusals, wire
from deepseek_jax.serve.chat_request import ChatRequest
from deepseek_jax.serve.generation import Generation
from deepseek_jax.serve.served import Served


class ChatAnswer:
  """Follows one answer: what its tokens mean, and how it ended.

  Attributes:
    text, reasoning: so far.
    calls: as a message has them, so far.
    finish: OpenAI's word for how it ended, or None.
    tokens: how many were generated, up to the one that ended it.
  """

  def __init__(self, asked: ChatRequest, served: Served):
    """Starts before the first token."""
    self._asked, self._served = asked, served
    self._parser = served.dialect.parser(
      asked.chat, asked.request.prompt, asked.common.stops
    )
    self.text, self.reasoning, self.calls = '', '', []
    self.finish: str | None = None
    self.tokens = 0
    self._logprobs: dict[str, list] = {'content': [], 'reasoning_content': []}

  @property
  def reasoning_tokens(self) -> int:
    """Returns how many tokens were reasoning so far."""
    return self._parser.reasoning_tokens

  def take(self, event: Event) -> Iterator[dict[str, Any]]:
    """Yields the deltas of an event, and sets `finish` when it ends."""
    for i, token in enumerate(event.tokens):
      if self.finish is not None:
        return
      self.tokens += 1
      if token in self._served.stop:
        continue
      before = self._parser.state
      delta = self._parser.feed(token)
      if event.logprobs and before == self._parser.state:
        self._note(before, event.logprobs[i])
      yield from self._deltas(delta)
    if self.finish is None and event.finish is not None:
      yield from self._end(event)

  def _note(self, state: str, told: LogProb) -> None:
    """Keeps the log-probability of a token that is no mark."""
    name = {'content': 'content', 'reasoning': 'reasoning_content'}.get(state)
    if name:
      self._logprobs[name].append(logprobs.entry(told, self._served))

  def _end(self, event: Event) -> Iterator[dict[str, Any]]:
    """Yields what was held back, and sets `finish`."""
    if event.finish not in ('stop', 'length'):
      raise refusals.broken(event.error or f'the answer was {event.finish}')
    yield from self._deltas(self._parser.finish())
    if self.finish is None:
      called = self.calls and event.finish == 'stop'
      self.finish = 'tool_calls' if called else event.finish

  def _deltas(self, delta: Delta) -> Iterator[dict[str, Any]]:
    """Yields what became certain, as the API writes it."""
    if delta.reasoning:
      self.reasoning += delta.reasoning
      yield {'reasoning_content': delta.reasoning}
    if delta.content:
      self.text += delta.content
      yield {'content': delta.content}
    for call in delta.tool_calls:
      if self.calls and not self._asked.parallel:
        self.finish = 'tool_calls'
        return
      written = {
        'id': f'call_{uuid.uuid4().hex[:24]}',
        'type': 'function',
        'function': {'name': call.name, 'arguments': call.arguments},
      }
      self.calls.append(written)
      yield {'tool_calls': [{'index': len(self.calls) - 1, **written}]}
    if self._parser.stopped:
      self.finish = 'stop'

  def take_logprobs(self) -> dict[str, list] | None:
    """Returns log-probabilities since the last call, if they were asked for."""
    if not self._asked.logprobs:
      return None
    out = self._logprobs
    self._logprobs = {name: [] for name in out}
    return out

  def message(self) -> dict[str, Any]:
    """Returns the whole answer as a message."""
    out: dict[str, Any] = {'role': 'assistant', 'content': self.text}
    out['refusal'] = None
    if self.reasoning:
      out['reasoning_content'] = self.reasoning
    if self.calls:
      out['content'] = self.text or None
      out['tool_calls'] = self.calls
    return out


class ChatAnswers:
  """Writes all answers to one request."""

  def __init__(self, asked: ChatRequest, served: Served, got: Generation):
    """Takes what was asked, the model, and what it generates."""
    self._asked, self._served, self._got = asked, served, got
    self._answers = [ChatAnswer(asked, served) for _ in range(asked.common.n)]
    self._head = {
      'id': f'chatcmpl-{uuid.uuid4().hex}',
      'created': int(time.time()),
      'model': served.name,
      'system_fingerprint': served.fingerprint,
    }

  def _tail(self) -> dict[str, Any]:
    """Returns the numbers of tokens, and the experts' load if asked for."""
    thought = sum(answer.reasoning_tokens for answer in self._answers)
    # The engine is ahead of a stop text, and goes on until all have ended.
    new = sum(answer.tokens for answer in self._answers)
    out = {'usage': self._got.usage(new, thought)}
    if self._asked.common.load:
      out['expert_load'] = heat.load(self._got.load)
    return out

  def _ended(self) -> bool:
    """Returns whether all answers have ended."""
    return all(answer.finish is not None for answer in self._answers)

  async def whole(self) -> Response:
    """Returns the response when all answers have ended."""
    told: list[list] = [[] for _ in self._answers]
    thought: list[list] = [[] for _ in self._answers]
    async for items in self._got:
      for item in items:
        at = item.event.index
        for _ in self._answers[at].take(item.event):
          pass
        new = self._answers[at].take_logprobs()
        if new is not None:
          told[at] += new['content']
          thought[at] += new['reasoning_content']
      if self._ended():
        self._got.halt()
    choices = [
      {
        'index': i,
        'message': answer.message(),
        'logprobs': {'content': told[i], 'reasoning_content': thought[i]}
        if self._asked.logprobs
        else None,
        'finish_reason': answer.finish,
      }
      for i, answer in enumerate(self._answers)
    ]
    return wire.answer(
      {
        **self._head,
        'object': 'chat.completion',
        'choices': choices,
        **self._tail(),
      }
    )

  async def chunks(self) -> AsyncGenerator[bytes, None]:
    """Yields the chunks of the stream as JSON."""
    for i in range(len(self._answers)):
      yield self._chunk(i, {'role': 'assistant', 'content': ''})
    async for items in self._got:
      for item in items:
        at = item.event.index
        answer = self._answers[at]
        if answer.finish is not None:
          continue
        for delta in answer.take(item.event):
          yield self._chunk(at, delta, answer.take_logprobs())
        if answer.finish is not None:
          left = answer.take_logprobs()
          yield self._chunk(at, {}, left, answer.finish)
      if self._ended():
        self._got.halt()
    if self._asked.common.usage or self._asked.common.load:
      tail = self._tail()
      if not self._asked.common.usage:
        tail.pop('usage')
      yield wire.to_json(self._plain([]) | tail)

  def _plain(self, choices: list) -> dict[str, Any]:
    """Returns a chunk with some choices."""
    out = {
      **self._head,
      'object': 'chat.completion.chunk',
      'choices': choices,
    }
    if self._asked.common.usage:
      out['usage'] = None
    return out

  def _chunk(
    self,
    index: int,
    delta: dict[str, Any],
    told: dict[str, list] | None = None,
    finish: str | None = None,
  ) -> bytes:
    """Returns a chunk of one answer as JSON."""
    choice = {
      'index': index,
      'delta': delta,
      'logprobs': told,
      'finish_reason': finish,
    }
    return wire.to_json(self._plain([choice]))
