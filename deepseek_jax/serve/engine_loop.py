"""Runs the engine on one thread, and carries its events to the event loop.

One thread alone calls the engine, for it owns JAX; asyncio hands it requests
through a queue and gets lists of events back. A stream that nobody reads is
ended, so a slow reader holds no more than its share.
"""

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.infer.engine import EngineBusy
from deepseek_jax.infer.request import Event, Request
from deepseek_jax.serve import refusals

_IDLE = 0.5  # seconds between looks at a queue that wakes by itself


class Item(NamedTuple):
  """Holds an event of one of a stream's requests.

  Attributes:
    place: which of them.
    event: what the engine gave.
    load: [L E] tokens per layer and expert of all its answers, on the last
      event of a request that asked for it.
  """

  place: int
  event: Event
  load: Any = None


class Stream:
  """Yields lists of what the engine gave to some requests, until all end.

  Lives on the event loop; `close` gives up what is still running.
  """

  def __init__(self, owner: 'EngineLoop', answers: int, held: int):
    """Opens an empty stream.

    Args:
      owner: runs the engine.
      answers: of all its requests.
      held: most items that wait to be read.
    """
    self.loop = asyncio.get_running_loop()
    self._owner, self._held = owner, held
    self._items: list[Item] = []
    self._new: list[Item] = []  # shared with the engine's thread
    self._lock = threading.Lock()
    self._left, self._error = answers, None
    self._filled = asyncio.Event()

  def put(self, items: Sequence[Item]) -> None:
    """Takes items of one step; on the engine's thread.

    A loop that is behind is woken once for all that has come.
    """
    with self._lock:
      waking, self._new = bool(self._new), [*self._new, *items]
    if not waking:
      _call(self, self._take)

  def _take(self) -> None:
    """Takes what has come; ends the stream if too much waits."""
    with self._lock:
      new, self._new = self._new, []
    if self._error is not None:
      return
    self._items += new
    if len(self._items) > self._held:
      self._items = []
      self.fail(refusals.slow())
      self.close()
    self._filled.set()

  def fail(self, error: refusals.ApiError) -> None:
    """Ends the stream by an error, behind what it holds."""
    if self._error is None:
      self._error = error
    self._filled.set()

  def __aiter__(self) -> 'Stream':
    """Returns itself."""
    return self

  async def __anext__(self) -> list[Item]:
    """Returns what has come since the last call; waits until there is some."""
    await asyncio.sleep(0)  # others' turn, however much has come
    while not self._items:
      if self._error is not None:
        raise self._error
      if not self._left:
        raise StopAsyncIteration
      self._filled.clear()
      await self._filled.wait()
    items, self._items = self._items, []
    self._left -= sum(item.event.finish is not None for item in items)
    return items

  def halt(self) -> None:
    """Cancels what still runs; its last events still come."""
    self._owner.halt(self)

  def close(self) -> None:
    """Gives up what still runs; harmless when all has ended."""
    if self._left:
      self._left = 0
      self._owner.cancel(self)


class _Running(NamedTuple):
  """Holds where the events of a request go."""

  stream: Stream
  place: int
  wants_load: bool


class EngineLoop:
  """Owns the engine's thread.

  Attributes:
    state: 'starting', 'ready', 'stopping', or 'broken' by an error.
    on_step: told the engine's numbers when it is ready and after each step.
  """

  def __init__(self, engine: Any, *, held: int = 4096):
    """Takes an engine that no other thread calls.

    Args:
      engine: see `deepseek_jax.infer.engine.Engine`.
      held: most events of a stream that wait to be read.
    """
    self.engine, self._held = engine, held
    self.on_step: Callable[[dict], object] = lambda stats: None
    self._inbox: queue.SimpleQueue = queue.SimpleQueue()
    self._running: dict[int, _Running] = {}
    self._ids: dict[Stream, list[int]] = {}
    self._left: dict[int, int] = {}
    self.state = 'starting'

  # On the event loop.

  async def open(
    self, requests: Sequence[Request], *, load: bool = False
  ) -> Stream:
    """Returns the stream of some requests; all are taken, or none.

    Args:
      requests: whose items carry their place in this list.
      load: whether the last event of a request carries its experts' load.

    Raises:
      ApiError: a request is wrong, the queue is full, or no engine runs.
    """
    if self.state != 'ready':
      raise refusals.not_ready(self.state)
    stream = Stream(self, sum(r.n for r in requests), self._held)
    accepted = stream.loop.create_future()
    self._inbox.put((self._submit, (stream, requests, load, accepted)))
    try:
      if self.state != 'ready':  # it may look into the inbox no more
        raise refusals.not_ready(self.state)
      await accepted
    except BaseException:
      stream.close()
      raise
    return stream

  def cancel(self, stream: Stream) -> None:
    """Gives up all requests of a stream."""
    self._inbox.put((self._cancel, (stream,)))

  def halt(self, stream: Stream) -> None:
    """Ends all requests of a stream, whose last events it still gets."""
    self._inbox.put((self._halt, (stream,)))

  def stop(self) -> None:
    """Lets `run` return; may be called from any thread."""
    self._inbox.put((None, ()))

  # On the engine's thread.

  def run(self, say: Callable[[str], object] | None = None) -> None:
    """Compiles, then serves until `stop`; a failed engine fails its streams.

    Args:
      say: told about the progress of compilation.
    """
    try:
      self.engine.warm_up(say)
      self.on_step(dict(self.engine.stats))
      self.state = 'ready'
      while self._take():
        if self.engine.busy():
          self._step()
    except BaseException as error:
      self.state = 'broken'
      self._fail_all()
      if not isinstance(error, Exception):
        raise
      traceback.print_exc()
    else:
      self.state = 'stopping'
      self._fail_all()
    self._refuse()

  def _take(self) -> bool:
    """Does what asyncio asks for; waits if the engine has nothing to do."""
    wait = not self.engine.busy()
    while True:
      try:
        call, args = self._inbox.get(block=wait, timeout=_IDLE)
      except queue.Empty:
        if not wait:
          return True
        continue
      if call is None:
        return False
      call(*args)
      wait = wait and not self.engine.busy()

  def _submit(
    self,
    stream: Stream,
    requests: Sequence[Request],
    load: bool,
    accepted: asyncio.Future,
  ) -> None:
    """Hands requests to the engine; takes them back if one is refused."""
    ids = []
    try:
      for place, request in enumerate(requests):
        ids.append(self.engine.submit(request))
        self._running[ids[-1]] = _Running(stream, place, load)
        self._left[ids[-1]] = request.n
    except InputError as error:
      for number in ids:
        self._forget(number)
        self.engine.cancel(number)
      answer = (
        refusals.busy(str(error))
        if isinstance(error, EngineBusy)
        else refusals.refused(error)
      )
      _call(stream, _settle, accepted, answer)
      return
    self._ids[stream] = ids
    _call(stream, _settle, accepted, None)

  def _cancel(self, stream: Stream) -> None:
    """Gives up all requests of a stream."""
    for number in self._ids.get(stream, ()):
      if number in self._running:
        self._forget(number)
        self.engine.cancel(number)
    self._ids.pop(stream, None)

  def _halt(self, stream: Stream) -> None:
    """Ends all requests of a stream."""
    for number in self._ids.get(stream, ()):
      self.engine.cancel(number)

  def _forget(self, number: int) -> None:
    """Drops a request whose events nobody waits for any more."""
    self._running.pop(number, None)
    self._left.pop(number, None)

  def _step(self) -> None:
    """Runs one step and hands its events out, a list for each stream."""
    lists: dict[Stream, list[Item]] = {}
    for event in self.engine.step():
      running = self._running.get(event.request)
      if running is None:  # given up
        continue
      load = None
      if event.finish is not None:
        load = self._ended(event.request, running)
      item = Item(running.place, event, load)
      lists.setdefault(running.stream, []).append(item)
    for stream, items in lists.items():
      stream.put(items)
    self.on_step(dict(self.engine.stats))

  def _ended(self, number: int, running: _Running) -> Any:
    """Counts an answer that ended; returns the experts' load with the last."""
    self._left[number] -= 1
    if self._left[number]:
      return None
    self._forget(number)
    ids = self._ids[running.stream]
    ids.remove(number)
    if not ids:
      del self._ids[running.stream]
    return self.engine.expert_load(number) if running.wants_load else None

  def _fail_all(self) -> None:
    """Ends every stream by an error."""
    for stream in {running.stream for running in self._running.values()}:
      _call(stream, stream.fail, refusals.broken(f'the engine is {self.state}'))
    self._running.clear()
    self._ids.clear()

  def _refuse(self) -> None:
    """Refuses what came while the engine stopped."""
    while True:
      try:
        call, args = self._inbox.get_nowait()
      except queue.Empty:
        return
      if call == self._submit:
        stream, _, _, accepted = args
        _call(stream, _settle, accepted, refusals.not_ready(self.state))


def _settle(future: asyncio.Future, error: Exception | None) -> None:
  """Settles a future that may have been cancelled."""
  if future.done():
    return
  if error is None:
    future.set_result(None)
  else:
    future.set_exception(error)


def _call(stream: Stream, function: Callable, *args: Any) -> None:
  """Calls a function on a stream's event loop, if that still runs."""
  try:
    stream.loop.call_soon_threadsafe(function, *args)
  except RuntimeError:  # the loop is closed: nobody waits
    return


def wait_until_ready(loop: EngineLoop, seconds: float) -> bool:
  """Returns whether an engine came up within some seconds."""
  end = time.monotonic() + seconds
  while loop.state == 'starting' and time.monotonic() < end:
    time.sleep(0.01)
  return loop.state == 'ready'
