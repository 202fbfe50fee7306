"""Adds up where the time of a run went, all its launches together.

`timeline.jsonl` has lines `{"phase": "step", "seconds": 1.5, "step": 20}`: the
seconds that a phase took since the line before, and the completed steps then.
Phases: init, restore, compile, data, step, evaluate, checkpoint, and lost: what
was computed after the checkpoint that a later launch went on from.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deepseek_jax import files
from deepseek_jax.errors import naming
from deepseek_jax.record.json_lines import read_lines
from deepseek_jax.record.metrics import set_aside

_REDONE = ('data', 'step', 'evaluate', 'checkpoint')
_SECONDS_BETWEEN_LINES = 10.0


class Timeline:
  """Adds up the seconds of phases; a killed process loses the last ten.

  Args:
    path: the file; None writes nothing, for all but one of several processes.
    say: takes one line when the file of earlier launches is damaged or gone.
  """

  def __init__(
    self, path: Path | None, say: Callable[[str], None] = lambda line: None
  ):
    self._path, self._say = path, say
    self._seconds: dict[str, float] = {}
    self._written = time.monotonic()
    self._step = 0

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the seconds that its body takes towards a phase."""
    start = time.monotonic()
    try:
      yield
    finally:
      self.add(name, time.monotonic() - start)

  def add(self, name: str, seconds: float) -> None:
    """Adds seconds to a phase; they are written with the next lines."""
    self._seconds[name] = self._seconds.get(name, 0.0) + seconds

  def begin(self, step: int) -> None:
    """Goes on from `step`: what earlier launches did beyond it is lost."""
    self._step = step
    if self._path is None:
      return
    if not self._path.exists():
      if step:
        self._say(f'{self._path} is gone: the time of earlier launches is lost')
      return
    rows, damaged = read_lines(self._path, _row)
    for _, row in rows:
      if row.get('step', 0) > step and row['phase'] in _REDONE:
        row['phase'] = 'lost'
        row['step'] = step  # lost once
    with files.whole(self._path) as scratch:
      scratch.write_text(''.join(json.dumps(row) + '\n' for _, row in rows))
      if damaged:
        self._say(
          f'{self._path}, line {damaged[0].number} is not one of phase, seconds'
          f' and step: the file is now {set_aside(self._path)}, and the other'
          ' lines go on'
        )

  def reached(self, step: int) -> None:
    """Notes that a step is complete; writes when some time has passed."""
    self._step = step
    if time.monotonic() - self._written > _SECONDS_BETWEEN_LINES:
      self.write()

  def write(self) -> None:
    """Appends a line for each phase since the last call."""
    if self._path is None:
      return
    lines = (
      json.dumps({'phase': name, 'seconds': seconds, 'step': self._step})
      for name, seconds in self._seconds.items()
    )
    text = ''.join(line + '\n' for line in lines)
    with naming(self._path), self._path.open('a') as file:
      file.write(text)
    self._seconds.clear()
    self._written = time.monotonic()

  def summary(self) -> str:
    """Returns 'time: step 81.0 %, compile 12.0 %, ...', the longest first."""
    total = totals(self._path) if self._path else {}
    everything = math.fsum(total.values()) or 1.0
    parts = (
      f'{name} {100 * seconds / everything:.1f} %'
      for name, seconds in sorted(total.items(), key=lambda item: -item[1])
    )
    return f'time: {", ".join(parts)}'


def totals(path: Path) -> dict[str, float]:
  """Returns seconds per phase, of lines that can be read; {} without a file."""
  out: dict[str, float] = {}
  for _, row in read_lines(path, _row)[0]:
    out[row['phase']] = out.get(row['phase'], 0.0) + row['seconds']
  return out


def _row(row: dict) -> dict:
  """Returns a line's row, as `read_lines` wants it."""
  sound = math.isfinite(row['seconds']) and row.get('step', 0) >= 0
  if not (sound and isinstance(row['phase'], str)):
    raise ValueError
  return row
