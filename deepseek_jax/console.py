"""How far a run is: one line redrawn on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping

_SECONDS_BETWEEN_LINES = 10.0  # where no line can be redrawn


def progress(total: int | None, last_step: int):
  """The kind of progress that stdout can show, from a step to a last one."""
  kind = _LiveLine if sys.stdout.isatty() else _PlainLines
  return kind(total, max(last_step, 0))


class _LiveLine:
  """One line at the foot of a terminal, redrawn in place."""

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

  def update(self, step: int, row: Mapping[str, float]):
    self._bar.update(self._task, completed=step, description=_text(row))

  def log(self, text: str):
    self._bar.console.print(text, markup=False, highlight=False)

  def close(self):
    self._bar.stop()


class _PlainLines:
  """Lines for a log file: the first, one every ten seconds, the last."""

  def __init__(self, total: int | None, start: int):
    del start  # of no account to a speed
    self._total = total
    self._first: tuple[int, float] | None = None  # step, and when it was done
    self._next = -math.inf  # when the next line is due
    self._waiting: tuple[int, Mapping[str, float]] | None = None

  def update(self, step: int, row: Mapping[str, float]):
    self._waiting = (step, row)
    now = time.monotonic()
    # The first step compiles: what is left is told by the later ones.
    self._first = self._first or (step, now)
    if now >= self._next:
      self._next = now + _SECONDS_BETWEEN_LINES
      self._print(now)

  def _print(self, now):
    step, row = self._waiting
    self._waiting = None
    of = '' if self._total is None else f'/{self._total}'
    left = ''
    first, then = self._first
    if self._total is not None and first < step < self._total:
      rate = (now - then) / (step - first)
      left = f'  left {_clock(rate * (self._total - step))}'
    print(f'step {step}{of}  {_text(row)}{left}', flush=True)

  def log(self, text: str):
    print(text, flush=True)

  def close(self):
    if self._waiting:
      self._print(time.monotonic())


def _clock(seconds: float) -> str:
  minutes, second = divmod(round(seconds), 60)
  hour, minute = divmod(minutes, 60)
  return f'{hour}:{minute:02}:{second:02}'


def _text(row: Mapping[str, float]) -> str:
  return '  '.join(f'{name} {short(value)}' for name, value in row.items())


def short(value: float) -> str:
  """A number for people: four digits, whole from ten thousand on."""
  size = abs(value)
  if not math.isfinite(value):
    return str(value)
  if size >= 1e4 or isinstance(value, int):
    return f'{value:,.0f}'
  return f'{value:.4g}' if size >= 1e-3 or not size else f'{value:.2e}'
