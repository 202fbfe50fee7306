"""Compiles a step in a thread ahead of its use; logs what compiling cost."""

import concurrent.futures
import threading
import time

import jax

from deepseek_jax.parallel import endings
from deepseek_jax.record.metrics import MetricsWriter, NoMetrics

_SECONDS_BETWEEN_LINES = 15.0  # while a step is compiled


class CompiledAhead:
  """Compiles a lowered step in a thread of its own."""

  def __init__(self, lowered: jax.stages.Lowered, batch: dict):
    """Begins."""
    self._kinds = _kinds(batch)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    self._done = pool.submit(self._compile, lowered)
    pool.shutdown(wait=False)
    endings.not_to_wait_for(self._done)

  def _compile(
    self, lowered: jax.stages.Lowered
  ) -> tuple[jax.stages.Compiled, float, bool]:
    """Returns the program, its seconds and whether the cache had it."""
    start, hits = time.perf_counter(), _hits_here()
    program = lowered.compile()
    return program, time.perf_counter() - start, _hits_here() > hits

  def takes(self, batch: dict) -> bool:
    """Returns whether the program is for batches like this one."""
    return self._kinds == _kinds(batch)

  def program(self, line: 'compiling') -> jax.stages.Compiled:
    """Waits for the program; `line` is to tell what it cost."""
    program, *cost = self._done.result()
    line.ahead = tuple(cost)
    return program


def _kinds(batch: dict) -> dict:
  """Returns shape and dtype of each array."""
  return {name: (a.shape, a.dtype) for name, a in batch.items()}


class compiling:
  """Logs how long compiling took, and whether it came from the cache.

  Attributes:
    ahead: if it was begun before, how long it took and whether it came from the
      cache.
  """

  ahead: tuple[float, bool] | None = None

  def __init__(self, rows: int, writer: MetricsWriter | NoMetrics):
    """Takes the sequences of the step, and the writer of the line."""
    self._rows, self._writer = rows, writer

  def __enter__(self) -> 'compiling':
    """Starts the clock."""
    self._start, self._hits = time.perf_counter(), _hits_here()
    self._done = threading.Event()
    self._writer.log(f'compiling the step for {self._rows} sequences')
    threading.Thread(target=self._tell, daemon=True).start()
    return self

  def _tell(self) -> None:
    """Logs now and then that compiling goes on."""
    while not self._done.wait(_SECONDS_BETWEEN_LINES):
      seconds = time.perf_counter() - self._start
      self._writer.log(f'still compiling, {seconds:.0f} s')

  def __exit__(self, *error: object) -> None:
    """Logs the line, unless compiling failed."""
    self._done.set()
    if error[0] is None:
      seconds = time.perf_counter() - self._start
      hit = _hits_here() > self._hits
      if self.ahead:
        seconds, hit = self.ahead
      self._writer.log(
        f'compiled the step for {self._rows} sequences in {seconds:.1f} s,'
        f' {"from the cache" if hit else "anew"}'
      )


_cache_hits = threading.local()  # each thread's own: two compile at once


def _hits_here() -> int:
  """Returns how many programs this thread had from the compilation cache."""
  return getattr(_cache_hits, 'number', 0)


def _count_hits(event: str, **_: object) -> None:
  """Counts the programs that come from the compilation cache."""
  _cache_hits.number = _hits_here() + (
    event == '/jax/compilation_cache/cache_hits'
  )


jax.monitoring.register_event_listener(_count_hits)
