"""Writes a trace of some steps, which XProf and Perfetto show.

RUN/profile/plugins/profile/… is what `tensorboard --logdir` (with xprof) or
`xprof --logdir` reads; perfetto_trace.json.gz there opens in ui.perfetto.dev.
"""

import re
from pathlib import Path

import jax

from deepseek_jax.errors import InputError


def steps(text: str) -> tuple[int, int]:
  """Returns the first and the last step of 'FIRST:LAST', or of 'STEP'.

  Raises:
    InputError: it is neither, or the last comes before the first.
  """
  found = re.fullmatch(r'(\d+)(?::(\d+))?', text)
  first = int(found[1]) if found else 0
  last = int(found[2] or first) if found else 0
  if not 1 <= first <= last:
    raise InputError(
      f'--profile={text}: write the first and the last step, as 10:12'
    )
  return first, last


class Profile:
  """Traces the steps of a run from one to another."""

  def __init__(self, span: tuple[int, int], folder: Path):
    """Takes first and last step, and where the trace goes."""
    self._first, self._last = span
    self._folder, self._going = folder, False

  def before(self, number: int) -> None:
    """Begins to trace if the step that comes is the first."""
    if number == self._first:
      jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
      self._going = True

  def after(self, number: int) -> str | None:
    """Ends the trace after the last step; returns a line on where it is."""
    if not self._going or number < self._last:
      return None
    self.close()
    return f'profile of steps {self._first} to {number}: {self._folder}'

  def close(self) -> None:
    """Ends a trace that is under way, also after an error."""
    if self._going:
      self._going = False
      jax.profiler.stop_trace()
