"""Follows the answers to one request, from the queue to the last token."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from deepseek_jax.infer.request import Request
from deepseek_jax.serve import refusals
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.engine_loop import EngineLoop, Item, Stream
from deepseek_jax.serve.meters import Meters


class Desk:
  """Lets requests in, as many at a time as the limits say."""

  def __init__(self, loop: EngineLoop, limits: Limits, meters: Meters):
    """Takes the engine's loop, the limits, and what is counted."""
    self.loop, self.limits, self.meters = loop, limits, meters
    self.under_way = 0

  def check(self) -> None:
    """Raises ApiError if no request can be let in now."""
    if self.under_way >= self.limits.requests:
      raise refusals.busy(
        f'{self.under_way} requests are under way, as many as this server takes'
      )

  async def open(
    self, requests: Sequence[Request], *, load: bool = False
  ) -> 'Generation':
    """Returns the answers to some requests; ApiError if they are refused."""
    self.check()
    self.under_way += 1
    start = time.monotonic()
    try:
      stream = await self.loop.open(requests, load=load)
    except BaseException:
      self.under_way -= 1
      raise
    self.meters.opened(self.under_way)
    return Generation(self, stream, requests, start)

  def leave(self) -> None:
    """Gives a place back."""
    self.under_way -= 1
    self.meters.closed(self.under_way)


class Generation:
  """Yields the engine's items, and counts tokens and times on the way.

  Attributes:
    completion_tokens: that the engine made for all answers so far.
    load: sum over the requests of the experts' load, or None.
  """

  def __init__(
    self,
    desk: Desk,
    stream: Stream,
    requests: Sequence[Request],
    start: float,
  ):
    """Takes what was opened at time.monotonic() = start."""
    self._desk, self._stream, self._requests = desk, stream, requests
    self._cached = [0] * len(requests)
    self._drafts = [0, 0]  # accepted, rejected
    self._start = self._last = start
    self._closed = self._halted = False
    self.completion_tokens, self.load = 0, None

  async def __aiter__(self) -> AsyncIterator[list[Item]]:
    """Yields items until all answers have ended.

    Raises:
      ApiError: the engine failed an answer, or time is up.
    """
    seconds = self._desk.limits.seconds
    end = self._start + seconds if seconds else float('inf')
    while True:
      left = end - time.monotonic()
      try:
        async with asyncio.timeout(left if seconds else None):
          items = await anext(self._stream, None)
      except TimeoutError:
        raise refusals.late(seconds) from None
      if items is None:
        return
      self._count(items)
      yield items
      for item in items:
        if item.event.finish == 'error':
          raise refusals.broken(item.event.error or 'the answer failed')

  def _count(self, items: Sequence[Item]) -> None:
    """Adds up what some items tell."""
    now = time.monotonic()
    new = sum(len(item.event.tokens) for item in items)
    if new:
      first = not self.completion_tokens
      self._desk.meters.tokens(new, now - self._last, first=first)
      self.completion_tokens += new
      self._last = now
    for item in items:
      usage = item.event.usage
      if usage is not None:
        at = item.place
        self._cached[at] = max(self._cached[at], usage.cached_tokens)
        self._drafts[0] += usage.accepted_drafts
        self._drafts[1] += usage.rejected_drafts
      if item.load is not None:
        self.load = item.load if self.load is None else self.load + item.load

  def usage(self, new: int, reasoning: int = 0) -> dict[str, Any]:
    """Returns the numbers of tokens, as OpenAI and DeepSeek name them.

    Args:
      new: tokens of all answers; the engine may have made more.
      reasoning: how many of them are reasoning.
    """
    prompt = sum(len(request.prompt) for request in self._requests)
    cached = sum(self._cached)
    return {
      'prompt_tokens': prompt,
      'completion_tokens': new,
      'total_tokens': prompt + new,
      'prompt_tokens_details': {'cached_tokens': cached},
      'completion_tokens_details': {
        'reasoning_tokens': reasoning,
        'accepted_prediction_tokens': self._drafts[0],
        'rejected_prediction_tokens': self._drafts[1],
      },
      'prompt_cache_hit_tokens': cached,
      'prompt_cache_miss_tokens': prompt - cached,
    }

  def halt(self) -> None:
    """Ends what still runs, as nothing more of it is needed."""
    if not self._halted:
      self._halted = True
      self._stream.halt()

  def close(self) -> None:
    """Gives up what still runs, and the place; once is enough."""
    if self._closed:
      return
    self._closed = True
    self._stream.close()
    prompt = sum(len(request.prompt) for request in self._requests)
    self._desk.meters.prompts(prompt, sum(self._cached))
    self._desk.leave()
