"""Runs a server as a process: HTTP on one thread, the engine on this one."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek_jax.errors import InputError
from deepseek_jax.serve import app as apps
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.engine_loop import EngineLoop
from deepseek_jax.serve.served import Served

_HEADERS = 1 << 15  # bytes before a body
_BACKLOG = 512  # connections that wait to be accepted
_KEEP_ALIVE = 15  # seconds for which a connection is kept without a request
_GRACE = 10  # seconds for what is under way when the server ends


def protocol(seconds: float) -> type[H11Protocol]:
  """Returns uvicorn's protocol, closing connections that send no request.

  Args:
    seconds: for the head of a request, from its connection or its first byte.
  """

  class Protocol(H11Protocol):
    """Closes a connection that is slow before a request's body."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      """Starts the clock with the connection."""
      super().connection_made(transport)
      self._start()

    def data_received(self, data: bytes) -> None:
      """Stops the clock when a head is whole, starts it with the next one."""
      super().data_received(data)
      if self.conn.their_state is not h11.IDLE:
        self._stop()
      elif self._clock is None and self.conn.trailing_data[0]:
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
      """Stops the clock."""
      self._stop()
      super().connection_lost(exc)

    def _start(self) -> None:
      self._clock = self.loop.call_later(seconds, self._close)

    def _stop(self) -> None:
      if self._clock is not None:
        self._clock.cancel()
        self._clock = None

    def _close(self) -> None:
      self._clock = None
      if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
        self.transport.close()

  return Protocol


def listen(config: ServeConfig) -> socket.socket:
  """Returns the socket that is listened on; InputError if it is taken."""
  family = socket.AF_INET6 if ':' in config.host else socket.AF_INET
  out = socket.socket(family)
  out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    out.bind((config.host.strip('[]'), config.port))
    out.listen(_BACKLOG)
  except (OSError, UnicodeError) as error:
    out.close()
    what = getattr(error, 'strerror', None) or str(error)
    raise InputError(
      f'--host={config.host} --port={config.port}: cannot listen there: {what};'
      ' choose another'
    ) from None
  return out


class Server:
  """Answers HTTP on a thread of its own."""

  def __init__(
    self,
    served: Served,
    engine: Any,
    config: ServeConfig,
    log: Callable[[str], object] = lambda line: None,
  ):
    """Listens; answers from `start` on.

    Args:
      served: the model.
      engine: of the same model.
      config: where and for whom.
      log: takes a line for each answer.
    """
    self.loop = EngineLoop(engine, held=config.limits.held)
    self.app = apps.build(served, self.loop, config, log=log)
    self._socket = listen(config)
    name = config.host if ':' not in config.host else f'[{config.host}]'
    self.url = f'http://{name}:{self._socket.getsockname()[1]}'
    self._uvicorn = uvicorn.Server(
      uvicorn.Config(
        self.app,
        http=protocol(config.limits.header_seconds),
        ws='none',
        lifespan='off',
        log_config=None,
        log_level='critical',  # a client that left is no error here
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=_HEADERS,
        limit_concurrency=4 * config.limits.requests + 64,
        backlog=_BACKLOG,
      )
    )
    self._thread = threading.Thread(target=self._serve, name='http')

  def start(self) -> None:
    """Starts to answer: /health at once, the rest when the engine is ready."""
    self._thread.start()
    while self._thread.is_alive() and not self._uvicorn.started:
      time.sleep(0.005)

  def stop(self) -> None:
    """Lets what is under way end for a while, then the engine, then all."""
    self._uvicorn.should_exit = True

  def join(self) -> None:
    """Waits for the end."""
    self._thread.join()

  def _serve(self) -> None:
    """Serves until `stop`; the engine ends with it."""
    try:
      self._uvicorn.run(sockets=[self._socket])
    finally:
      self._socket.close()
      self.loop.stop()

  def run(self, say: Callable[[str], object] | None = None) -> None:
    """Serves until the process is told to end (SIGINT, SIGTERM).

    The engine runs on the thread that calls this, which is the main one.

    Args:
      say: told about the progress of compilation.
    """

    def end(*_) -> None:
      # A second signal does not wait for what is under way.
      self._uvicorn.force_exit = self._uvicorn.should_exit
      self.stop()

    old = {s: signal.signal(s, end) for s in (signal.SIGINT, signal.SIGTERM)}
    self.start()
    try:
      self.loop.run(say)
    finally:
      self.stop()
      self.join()
      for number, handler in old.items():
        signal.signal(number, handler)
