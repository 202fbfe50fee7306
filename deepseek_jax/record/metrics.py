"""What a run tells of itself: one progress line, JSON lines, TensorBoard.

`metrics.jsonl` holds what the mathematics gives and `timings.jsonl` what the
clock gives, so two runs of one seed write the same bytes to the first, and a
resumed run writes what the uninterrupted one would have written.

One line is `{"step": 12, "loss": 2.5, ...}`. JSON has no number for what is not
finite; it is written as the string "NaN", "Infinity" or "-Infinity", and `read`
gives the float back. Nothing is rounded.
"""

import contextlib
import json
import math
import operator
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.console import progress
from deepseek_jax.errors import InputError, naming

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

  Raises:
    InputError: a line in a file is not JSON, or tensorboardX is asked for but
      not installed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int | None = None,
    tensorboard: bool = False,
    console: bool = True,
    resume_step: int | None = None,
  ):
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._events = _event_writer(workdir, resume_step) if tensorboard else None
    paths = {kind: workdir / name for kind, name in FILES.items()}
    last = [_prune(path, resume_step) for path in paths.values()]
    self._last_step = max(last)
    self._files = {k: p.open('a', encoding='utf-8') for k, p in paths.items()}
    self._progress = progress(total_steps, self._last_step) if console else None
    self._newest: dict[str, dict] = {kind: {} for kind in FILES}

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *error):
    self.close()

  def write(
    self,
    step: int,
    scalars: Mapping[str, Any],
    timings: Mapping[str, Any] | None = None,
  ):
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
    if self._events:
      for kind, row in rows.items():
        prefix = '' if kind == 'metrics' else 'timings/'
        for name, value in row.items():
          self._events.add_scalar(prefix + name, value, step)
    if self._progress:
      shown = {}
      for kind, row in rows.items():
        self._newest[kind] |= row
        shown |= dict(islice(self._newest[kind].items(), _SHOWN[kind]))
      self._progress.update(step, shown)

  def log(self, text: str):
    """Prints a line above the progress line; nothing with `console=False`."""
    if self._progress:
      self._progress.log(text)

  def close(self):
    """Ends the progress line and closes the files; may be called twice."""
    if self._progress:
      self._progress.close()
    if self._events:
      self._events.close()
    for file in self._files.values():
      with naming(file.name):
        file.close()


class NoMetrics(contextlib.AbstractContextManager):
  """Takes what a MetricsWriter takes and keeps nothing of it."""

  def __exit__(self, *error):
    pass

  def write(self, step: int, scalars: Mapping, timings: Mapping | None = None):
    pass

  def log(self, text: str):
    pass


def read(
  workdir: str | os.PathLike, kind: str = 'metrics'
) -> list[dict[str, float]]:
  """Lines of a run as dicts, oldest first; empty if the run wrote none.

  Args:
    workdir: the run's folder.
    kind: 'metrics' or 'timings'.

  Raises:
    InputError: a line is not JSON. A last line cut short by a crash is skipped.
  """
  if kind not in FILES:
    raise InputError(f'kind={kind!r}: choose one of {sorted(FILES)}')
  return [row for _, row in _lines(Path(workdir) / FILES[kind])]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
  """Complete lines of a file: their bytes and what they say."""
  if not path.exists():
    return []
  *complete, _ = path.read_bytes().split(b'\n')  # the rest was cut short
  result = []
  for number, line in enumerate(complete, 1):
    try:
      row = json.loads(line)
      row = {
        k: _NOT_FINITE[v] if isinstance(v, str) else v for k, v in row.items()
      }
      operator.index(row['step'])
    except (ValueError, KeyError, AttributeError, TypeError):
      raise InputError(
        f'{path}, line {number} is not a line of metrics: {line[:60]!r};'
        ' remove the line or start in an empty folder'
      ) from None
    result.append((line, row))
  return result


def _decode(value: str | float) -> float:
  return _NOT_FINITE[value] if isinstance(value, str) else value


def _prune(path: Path, resume_step: int | None) -> int:
  """Drops later steps and a line cut short; returns the last step or -1."""
  rows = _lines(path)
  if resume_step is not None:
    rows = [(line, row) for line, row in rows if row['step'] <= resume_step]
  kept = b''.join(line + b'\n' for line, _ in rows)
  if path.exists() and path.stat().st_size != len(kept):
    scratch = path.with_suffix('.tmp')
    with naming(scratch):
      scratch.write_bytes(kept)
    scratch.replace(path)  # a crash leaves the old file or the new one
  return rows[-1][1]['step'] if rows else -1


def _numbers(field: str, row: Mapping[str, Any]) -> dict[str, float]:
  if 'step' in row:
    raise InputError(f"{field}['step'] is taken: rename the scalar")
  return {name: _number(field, name, value) for name, value in row.items()}


def _number(field: str, name: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind in 'OUSmMc':
    raise InputError(
      f'{field}[{name!r}] must be one number, not {array.dtype} of shape'
      f' {array.shape}: reduce it or drop it'
    )
  array = array.reshape(())
  return int(array) if array.dtype.kind in 'iu' else float(array)


def _encode(row: Mapping[str, float]) -> str:
  names = {math.inf: 'Infinity', -math.inf: '-Infinity'}
  finite = {
    k: v if math.isfinite(v) else names.get(v, 'NaN') for k, v in row.items()
  }
  return json.dumps(finite, allow_nan=False)


def _event_writer(workdir: Path, resume_step: int | None):
  try:
    import tensorboardX
  except ImportError:
    raise InputError(
      'tensorboard=True needs tensorboardX: pip install tensorboardX, or set'
      ' tensorboard=False'
    ) from None
  purge = None if resume_step is None else resume_step + 1
  return tensorboardX.SummaryWriter(
    str(workdir / 'tensorboard'), purge_step=purge
  )
