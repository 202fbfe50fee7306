"""Reads requests and sends answers: whole, or as server-sent events."""

import asyncio
import json
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deepseek_jax.serve import refusals
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.json_fields import parse_body

_PING_SECONDS = 15.0  # proxies close what is silent
_LEFT = (OSError, ClientDisconnect)
_GONE = 499  # nobody reads it


def to_json(value: Any) -> bytes:
  """Returns a value as compact JSON; NaN is a defect here, so it raises."""
  text = json.dumps(
    value, ensure_ascii=False, allow_nan=False, separators=(',', ':')
  )
  return text.encode('utf-8', 'replace')


def answer(value: Any, status: int = 200, **headers: str) -> Response:
  """Returns a response that carries JSON."""
  return Response(
    to_json(value), status, headers, media_type='application/json'
  )


def answer_error(error: refusals.ApiError) -> Response:
  """Returns an error as a response."""
  return answer(error.body(), error.status, **error.headers)


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
  """Returns the JSON object of a request.

  Raises:
    ApiError: it is no JSON, too large, or comes too slowly.
  """
  kind = request.headers.get('content-type', '').partition(';')[0].strip()
  if kind.lower() != 'application/json':
    # A page of another server can send other kinds without being asked.
    raise refusals.ApiError(
      415, f'content-type is {kind[:60]!r}: send application/json'
    )
  if request.headers.get('content-encoding', 'identity') != 'identity':
    raise refusals.ApiError(415, 'content-encoding: send the body as it is')
  size = request.headers.get('content-length', '0')
  if not size.isascii() or not size.isdigit() or int(size[:12]) > limits.body:
    raise _too_large(limits)
  data = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for part in request.stream():
        data += part
        if len(data) > limits.body:
          raise _too_large(limits)
  except TimeoutError:
    raise refusals.ApiError(
      408,
      f'the body did not arrive within {limits.body_seconds:g} s',
      headers={'x-should-retry': 'false', 'connection': 'close'},
    ) from None
  if len(data) < 1 << 16:
    return parse_body(bytes(data))
  return await asyncio.to_thread(parse_body, bytes(data))


def _too_large(limits: Limits) -> refusals.ApiError:
  """Returns the error of a body over the limit."""
  return refusals.ApiError(
    413,
    f'the body is larger than {limits.body} bytes, which this server takes',
    code='body_too_large',
    headers={'connection': 'close'},
  )


async def gone(receive: Receive) -> None:
  """Returns when the client has closed the connection."""
  while (await receive())['type'] != 'http.disconnect':
    pass


async def until_gone(
  request: Request, work: Coroutine[Any, Any, Response]
) -> Response:
  """Returns what a coroutine makes; ends it if the client leaves before."""
  made = asyncio.create_task(work)
  left = asyncio.create_task(gone(request.receive))
  try:
    await asyncio.wait({made, left}, return_when=asyncio.FIRST_COMPLETED)
    return made.result() if made.done() else Response(status_code=_GONE)
  finally:
    await _end(made, left)


async def _end(*tasks: asyncio.Task) -> None:
  """Cancels tasks and waits until they have ended."""
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
  """Sends server-sent events until they end or the client leaves."""

  media_type = 'text/event-stream'

  def __init__(
    self,
    events: AsyncGenerator[bytes, None],
    close: Callable[[], object],
    patience: float,
  ):
    """Takes events, each the JSON that stands behind `data: `.

    Args:
      events: in order. An error becomes the last event.
      close: called in the end, however it comes.
      patience: seconds for which the client may read nothing.
    """
    super().__init__(headers={'cache-control': 'no-store'})
    del self.headers['content-length']
    self._events, self._close = events, close
    self._patience = patience

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the response."""
    sent = asyncio.create_task(self._send(send))
    left = asyncio.create_task(gone(receive))
    try:
      await asyncio.wait({sent, left}, return_when=asyncio.FIRST_COMPLETED)
      if sent.done() and not sent.cancelled():
        error = sent.exception()
        # A client that has left or reads nothing: TimeoutError is an OSError.
        if error is not None and not isinstance(error, _LEFT):
          raise error
    finally:
      await _end(sent, left)
      await self._events.aclose()
      self._close()

  async def _send(self, send: Send) -> None:
    """Sends head, events and end."""
    start = {
      'type': 'http.response.start',
      'status': self.status_code,
      'headers': self.raw_headers,
    }
    await send(start)
    writing = asyncio.Lock()

    async def write(data: bytes) -> None:
      async with writing, asyncio.timeout(self._patience):
        await send(
          {'type': 'http.response.body', 'body': data, 'more_body': True}
        )

    async def ping() -> None:
      while True:
        await asyncio.sleep(_PING_SECONDS)
        await write(b': ping\n\n')

    pinging = asyncio.create_task(ping())
    try:
      try:
        async for event in self._events:
          await write(b'data: ' + event + b'\n\n')
        await write(b'data: [DONE]\n\n')
      except refusals.ApiError as error:
        await write(b'data: ' + to_json(error.body()) + b'\n\n')
      except _LEFT:
        raise
      except Exception:
        traceback.print_exc()
        body = refusals.broken('an error of the server').body()
        await write(b'data: ' + to_json(body) + b'\n\n')
    finally:
      await _end(pinging)
    await send({'type': 'http.response.body', 'body': b'', 'more_body': False})
