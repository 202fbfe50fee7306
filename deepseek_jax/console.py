"""Shows how far a run is: one line redrawn, or plain lines off a terminal."""

import math
import sys
import time
from collections.abc import Mapping

_SECONDS_BETWEEN_LINES = 10.0  # where no line can be redrawn


def progress(total: int | None, last_step: int) -> '_LiveLine | _PlainLines':
  """Returns the kind of progress that stdout can show.

  Args:
    total: the last step; None if open.
    last_step: where the run goes on; -1 if it begins.
  """
  kind = _LiveLine if sys.stdout.isatty() else _PlainLines
  return kind(total, max(last_step, 0))


class _LiveLine:
  """Shows one line at the foot of a terminal, redrawn in place."""

  def __init__(self, total: int | None, start: int):
    from rich.console import Console
    from rich.progress import (
      BarColumn,
      MofNCompleteColumn,
      Progress,
      TextColumn,
      TimeElapsedColumn,
      TimeRemainingColumn,
    )
    from rich.table import Column

    # Takes what the counters leave, and is cut where the terminal ends.
    text = Column(ratio=1, no_wrap=True, overflow='ellipsis')
    self._bar = Progress(
      MofNCompleteColumn(),
      BarColumn(bar_width=16),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      TextColumn('{task.description}', markup=False, table_column=text),
      console=Console(),
      expand=True,
    )
    self._task = self._bar.add_task('', total=total, completed=start)
    self._bar.start()

  def update(self, step: int, row: Mapping[str, float]) -> None:
    """Redraws the line: completed steps, and values by name."""
    self._bar.update(self._task, completed=step, description=_text(row))

  def log(self, text: str) -> None:
    """Prints a line above."""
    self._bar.console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    """Ends the line; it stays as it is."""
    self._bar.stop()


class _PlainLines:
  """Prints lines for a log file: the first, one every ten seconds, the last."""

  def __init__(self, total: int | None, start: int):
    del start  # of no account to a speed
    self._total = total
    self._first: tuple[int, float] | None = None  # step, and when it was done
    self._next = -math.inf  # when the next line is due
    self._waiting: tuple[int, Mapping[str, float]] | None = None

  def update(self, step: int, row: Mapping[str, float]) -> None:
    """Prints a line of completed steps and values if one is due."""
    self._waiting = (step, row)
    now = time.monotonic()
    # The first step compiles: what is left is told by the later ones.
    self._first = self._first or (step, now)
    if now >= self._next:
      self._next = now + _SECONDS_BETWEEN_LINES
      self._print(now)

  def _print(self, now: float) -> None:
    """Prints the line that waits, with the time left by the speed so far."""
    step, row = self._waiting
    self._waiting = None
    of = '' if self._total is None else f'/{self._total}'
    left = ''
    first, then = self._first
    if self._total is not None and first < step < self._total:
      rate = (now - then) / (step - first)
      left = f'  left {_clock(rate * (self._total - step))}'
    print(f'step {step}{of}  {_text(row)}{left}', flush=True)

  def log(self, text: str) -> None:
    """Prints a line."""
    print(text, flush=True)

  def close(self) -> None:
    """Prints the last line, if it waits."""
    if self._waiting:
      self._print(time.monotonic())


def _clock(seconds: float) -> str:
  """Returns seconds as hours, minutes and seconds: '1:02:03'."""
  minutes, second = divmod(round(seconds), 60)
  hour, minute = divmod(minutes, 60)
  return f'{hour}:{minute:02}:{second:02}'


def _text(row: Mapping[str, float]) -> str:
  """Returns values by name as one line."""
  return '  '.join(f'{name} {short(value)}' for name, value in row.items())


def short(value: float) -> str:
  """Returns a number for people: four digits, whole from ten thousand on."""
  size = abs(value)
  if not math.isfinite(value):
    return str(value)
  if size >= 1e15 and isinstance(value, float):
    return f'{value:.3e}'
  if size >= 1e4 or isinstance(value, int):
    return f'{value:,.0f}'
  return f'{value:.4g}' if size >= 1e-3 or not size else f'{value:.2e}'
