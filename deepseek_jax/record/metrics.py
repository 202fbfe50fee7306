"""Writes the scalars of a run: one progress line, JSON lines, TensorBoard.

`metrics.jsonl` holds what the mathematics gives and `timings.jsonl` what the
clock gives, so two runs of one seed write the same bytes to the first, and a
resumed run writes what the uninterrupted one would have written.

One line is `{"step": 12, "loss": 2.5, ...}`. JSON has no number for what is not
finite; it is written as the string "NaN", "Infinity" or "-Infinity", and `read`
gives the float back. Nothing is rounded.
"""

import contextlib
import itertools
import json
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.console import progress
from deepseek_jax.errors import InputError, naming
from deepseek_jax.record.json_lines import read_lines
from deepseek_jax.record.writers import ScalarWriter, TensorBoard

FILES = {'metrics': 'metrics.jsonl', 'timings': 'timings.jsonl'}
_SHOWN = {'metrics': 4, 'timings': 1}  # values on the progress line

_NOT_FINITE = {
  'NaN': math.nan,
  'Infinity': math.inf,
  '-Infinity': -math.inf,
}


class MetricsWriter:
  """Appends scalars of a run to its folder and shows its progress.

  In a run of several processes, one of them writes.

  Args:
    workdir: the run's folder; made if absent.
    total_steps: the last step, for the bar and the time left; None if open.
    tensorboard: also write event files to `workdir/tensorboard`.
    console: show progress on stdout: one line, redrawn, on a terminal; a plain
      line every ten seconds elsewhere.
    resume_step: the step that the run continues from: lines of later steps are
      dropped (-1 drops all). None appends to what is there. Write a step's
      lines before saving its checkpoint, or a resumed run lacks them.
    writers: take every line, too (see writers.ScalarWriter); closed with it.
    say: takes one line for each file that is damaged, which is then renamed and
      begun anew with what can be read of it, and for each that lacks steps
      before `resume_step`. None refuses damaged files.

  Raises:
    InputError: a line in a file is not JSON and `say` is None, or tensorboardX
      is asked for but not installed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int | None = None,
    tensorboard: bool = False,
    console: bool = True,
    resume_step: int | None = None,
    writers: Sequence[ScalarWriter] = (),
    say: Callable[[str], None] | None = None,
  ):
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._writers = [*writers]
    if tensorboard:
      self._writers.append(TensorBoard(workdir, resume_step))
    paths = {kind: workdir / name for kind, name in FILES.items()}
    kept = [_prune(path, resume_step, say) for path in paths.values()]
    self._last_step = max(steps[-1] if steps else -1 for steps in kept)
    for path, steps in zip(paths.values(), kept):
      lacking = _lacking(steps, resume_step or 0)
      if lacking and say:
        say(f'{path} lacks {lacking}: they are lost, and the run goes on')
    self._files = {k: p.open('a', encoding='utf-8') for k, p in paths.items()}
    self._progress = progress(total_steps, self._last_step) if console else None
    self._newest: dict[str, dict] = {kind: {} for kind in FILES}

  def __enter__(self) -> 'MetricsWriter':
    """Returns the writer, which `with` closes."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes the files."""
    self.close()

  def write(
    self,
    step: int,
    scalars: Mapping[str, Any],
    timings: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes one step's numbers; a step may have several lines.

    Args:
      step: completed steps, never less than in the call before.
      scalars: numbers that the seed determines, to `metrics.jsonl`.
      timings: numbers that depend on the clock, to `timings.jsonl`.

    Raises:
      InputError: the step goes back, or a value is not one number.
    """
    step = operator.index(step)
    if step < self._last_step:
      raise InputError(
        f'step={step} comes after step {self._last_step}: pass'
        f' resume_step={step - 1} to MetricsWriter to drop the later lines'
      )
    rows = {
      'metrics': _numbers('scalars', scalars),
      'timings': _numbers('timings', timings or {}),
    }
    self._last_step = step
    for kind, row in rows.items():
      if row:
        with naming(self._files[kind].name):
          self._files[kind].write(_encode({'step': step, **row}) + '\n')
          self._files[kind].flush()
    for writer in self._writers:
      writer.write(step, rows['metrics'], rows['timings'])
    if self._progress:
      shown = {}
      for kind, row in rows.items():
        self._newest[kind] |= row
        shown |= dict(islice(self._newest[kind].items(), _SHOWN[kind]))
      self._progress.update(step, shown)

  def sync(self) -> None:
    """Returns when all lines are on disk, whatever befalls the machine."""
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())

  def log(self, text: str) -> None:
    """Prints a line above the progress line; nothing with `console=False`."""
    if self._progress:
      self._progress.log(text)

  def close(self) -> None:
    """Ends the progress line and closes the files; may be called twice."""
    if self._progress:
      self._progress.close()
    for writer in self._writers:
      writer.close()
    self._writers = []
    for file in self._files.values():
      with naming(file.name):
        file.close()


class NoMetrics(contextlib.AbstractContextManager):
  """Takes what a MetricsWriter takes and keeps nothing of it."""

  def __exit__(self, *error: object) -> None:
    """Does nothing."""
    pass

  def write(
    self, step: int, scalars: Mapping, timings: Mapping | None = None
  ) -> None:
    """Does nothing."""
    pass

  def sync(self) -> None:
    """Does nothing."""
    pass

  def log(self, text: str) -> None:
    """Does nothing."""
    pass


def read(
  workdir: str | os.PathLike, kind: str = 'metrics'
) -> list[dict[str, float]]:
  """Returns the lines of a run as dicts, oldest first; empty if there are none.

  Args:
    workdir: the run's folder.
    kind: 'metrics' or 'timings'.

  Raises:
    InputError: there is no such folder, or a line is not JSON. A last line
      that a crash cut short is skipped.
  """
  if kind not in FILES:
    raise InputError(f'kind={kind!r}: choose one of {sorted(FILES)}')
  if not os.path.isdir(workdir):
    raise InputError(f'workdir {os.fspath(workdir)}: is no folder; name a run')
  rows, wrong = _lines(Path(workdir) / FILES[kind])
  if wrong:
    raise InputError(f'{wrong[0]}; remove the line')
  return [row for _, row in rows]


def unused(path: Path, suffix: str) -> Path:
  """Returns a name beside `path` that no file has: its own, suffix, number."""
  numbers = range(1, 1 << 30)
  names = (path.with_name(f'{path.name}{suffix}{n}') for n in numbers)
  return next(name for name in names if not os.path.lexists(name))


def set_aside(path: Path) -> str:
  """Renames a damaged file, so that nothing overwrites it -> its new name."""
  aside = unused(path, '.damaged-')
  path.rename(aside)
  return aside.name


def _lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[str]]:
  """Returns lines and their numbers by name, and a text per damaged one."""
  rows, damaged = read_lines(path, _row)
  return rows, [
    f'{path}, line {number} is not a line of metrics: {line[:60]!r}'
    for number, line in damaged
  ]


def _row(row: dict) -> dict[str, Any]:
  """Returns the numbers of a line by name, as `read_lines` wants it."""
  row = {k: _decode(v) for k, v in row.items()}
  operator.index(row['step'])
  return row


def _decode(value: str | float) -> float:
  """Returns a value of a line as a number, 'NaN' and the like included."""
  if isinstance(value, str):
    return _NOT_FINITE[value]
  if not isinstance(value, int | float):
    raise TypeError(value)
  return value


def _prune(
  path: Path, resume_step: int | None, say: Callable[[str], None] | None
) -> list[int]:
  """Drops later steps and what cannot be read -> the steps that stay.

  Args:
    path: a file of lines; may be absent.
    resume_step: the last step that stays; None keeps all.
    say: takes one line when the file is damaged; None refuses it.

  Raises:
    InputError: a line cannot be read and `say` is None.
  """
  rows, wrong = _lines(path)
  if wrong and say is None:
    raise InputError(f'{wrong[0]}; remove the line or start in an empty folder')
  if resume_step is not None:
    rows = [(line, row) for line, row in rows if row['step'] <= resume_step]
  kept = b''.join(line + b'\n' for line, _ in rows)
  if path.exists() and path.stat().st_size != len(kept):
    with files.whole(path) as scratch:
      scratch.write_bytes(kept)
      if wrong:
        more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
        say(
          f'{wrong[0]}{more}: the file is now {set_aside(path)}, and the other'
          ' lines go on'
        )
  return [row['step'] for _, row in rows]


def _lacking(steps: list[int], last: int) -> str:
  """Names steps of 1 to `last` without a line: 'step 3, steps 5 to 9' or ''."""
  there = sorted({0, *steps, last + 1})
  spans = [
    f'step {a + 1}' if a + 2 == b else f'steps {a + 1} to {b - 1}'
    for a, b in itertools.pairwise(there)
    if a >= 0 and a + 1 < b <= last + 1
  ]
  return ', '.join(spans[:4]) + (' and more' if len(spans) > 4 else '')


def _numbers(field: str, row: Mapping[str, Any]) -> dict[str, float]:
  """Returns scalars as Python numbers; raises InputError where one is not."""
  if 'step' in row:
    raise InputError(f"{field}['step'] is taken: rename the scalar")
  return {name: _number(field, name, value) for name, value in row.items()}


def _number(field: str, name: str, value: Any) -> int | float:
  """Returns a scalar as a Python number.

  Raises:
    InputError: it has several values, or a dtype that is not a real number.
  """
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind in 'OUSmMc':
    raise InputError(
      f'{field}[{name!r}] must be one number, not {array.dtype} of shape'
      f' {array.shape}: reduce it or drop it'
    )
  array = array.reshape(())
  return int(array) if array.dtype.kind in 'iu' else float(array)


def _encode(row: Mapping[str, float]) -> str:
  """Returns a line of JSON, what is not finite as a string."""
  names = {math.inf: 'Infinity', -math.inf: '-Infinity'}
  finite = {
    k: v if math.isfinite(v) else names.get(v, 'NaN') for k, v in row.items()
  }
  return json.dumps(finite, allow_nan=False)
