"""Ends a process whose step hangs, after dumping every stack.

A collective whose peer is gone waits forever, and a scheduler finds a healthy
job. Steps of one run take about the same time, so one that takes many times
their median is stuck.
"""

import collections
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

STATUS = 79
_WINDOW, _LEAST = 64, 3  # steps that make the median; steps before it counts


class Watchdog:
  """Watches the steps that run inside `with watchdog.step()`.

  Time counts in ticks while this process runs: one that was suspended and goes
  on is not taken for stuck.

  Args:
    factor: a step may take this many medians of the steps before; 0 watches
      nothing.
    least: seconds that a step may take in any case.
    on_hang: called before the end, with the seconds that the step took.
  """

  def __init__(
    self,
    factor: float,
    least: float,
    on_hang: Callable[[float], None] = lambda seconds: None,
  ):
    """Starts the watching thread, unless `factor` is 0."""
    self._factor, self._least, self._on_hang = factor, least, on_hang
    self._taken = collections.deque(maxlen=_WINDOW)
    self._armed, self._over = threading.Event(), threading.Event()
    self._spent = 0.0
    if factor:
      threading.Thread(target=self._watch, daemon=True).start()

  @property
  def limit(self) -> float | None:
    """Returns the seconds the next step may take; None for the first steps."""
    if not self._factor or len(self._taken) < _LEAST:
      return None
    return max(self._factor * float(np.median(self._taken)), self._least)

  @contextlib.contextmanager
  def step(self) -> Iterator[None]:
    """Watches one step; its time counts in the median if it ends well."""
    start, self._spent = time.perf_counter(), 0.0
    if self.limit is not None:
      self._armed.set()
    try:
      yield
      self._taken.append(time.perf_counter() - start)
    finally:
      self._armed.clear()

  def close(self) -> None:
    """Ends the watching thread."""
    self._over.set()
    self._armed.set()

  def _watch(self) -> None:
    """Waits for armed steps, in a thread, and ends one past its limit."""
    while self._armed.wait() and not self._over.is_set():
      limit = self.limit
      tick = min(limit / 10, 1.0)
      start = time.perf_counter()
      self._over.wait(tick)
      # At most two ticks: a suspended process has not spent the time.
      self._spent += min(time.perf_counter() - start, 2 * tick)
      if self._armed.is_set() and self._spent > limit:
        self._end(limit)

  def _end(self, limit: float) -> None:
    """Prints all stacks, calls `on_hang` and ends the process."""
    if self._over.is_set():
      return
    print(
      f'error: a step takes more than {limit:.1f} s'
      f' ({self._factor:g} x the median, at least {self._least:g} s):'
      ' all stacks follow',
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    try:
      self._on_hang(self._spent)
    finally:
      # Not sys.exit: the main thread is what hangs.
      os._exit(STATUS)
