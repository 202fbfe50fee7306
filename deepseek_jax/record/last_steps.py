"""Keeps the last steps of a run, to be written when it gives up.

`abort.jsonl` has one line per step: its scalars, the norm of the gradient in
every block, the load of every expert, and which batch it was (the number of its
first example, its size, the SHA-256 of its rows, or of those that the writing
one of several processes read), so that the batch can be built again and the
step repeated.
"""

import collections
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.errors import InputError
from deepseek_jax.record.json_lines import read_lines

FILE = 'abort.jsonl'


class LastSteps:
  """Keeps the newest `count` rows, one a step."""

  def __init__(self, path: Path, count: int):
    self._path = path
    self._rows: collections.deque[dict] = collections.deque(maxlen=count)

  def add(self, step: int, batch: Mapping, metrics: Mapping) -> None:
    """Keeps a step.

    Args:
      step: completed steps, this one too.
      batch: which it read, as `identity` returns it.
      metrics: what it returned: scalars, and 'load' [L E], 'dropped' [L].
    """
    self._rows.append({'step': step, 'batch': batch, **metrics})

  def write(self) -> None:
    """Writes the rows, oldest first; nothing when there are none."""
    if not self._rows:
      return
    lines = (json.dumps(_plain(r), allow_nan=False) for r in self._rows)
    with files.whole(self._path) as scratch:
      scratch.write_text(''.join(line + '\n' for line in lines))


def identity(
  index: int, size: int, block: tuple[int, int], batch: Mapping[str, Any]
) -> dict:
  """Returns which batch this is, for JSON.

  Args:
    index: number of its first example in the stream.
    size: its rows.
    block: (i, n): `batch` is the i-th of n equal blocks of these rows.
    batch: 'tokens' and the rest.

  Returns:
    'index', 'size', 'rows' (from, to; those at hand) and their 'sha256'.
  """
  length = len(batch['tokens'])
  rows = [block[0] * length, block[0] * length + length]
  return {'index': index, 'size': size, 'rows': rows, 'sha256': digest(batch)}


def digest(batch: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of the tokens of a batch, rows in order."""
  tokens = np.ascontiguousarray(batch['tokens'], np.int32)
  return hashlib.sha256(tokens.tobytes()).hexdigest()


def _plain(value: Any) -> Any:
  """Returns a value as JSON has it; floats that are not finite as text.

  Text is 'nan', 'inf' or '-inf'; arrays become lists.
  """
  if isinstance(value, Mapping):
    return {name: _plain(v) for name, v in value.items()}
  if isinstance(value, str | int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  listed = np.asarray(value).tolist()
  if isinstance(listed, list):
    return [_plain(v) for v in listed]
  return _plain(listed)


def read(workdir: str | os.PathLike) -> list[dict]:
  """Returns the rows of a run that gave up, oldest first.

  Numbers that JSON lacks, written as text, are floats again.

  Raises:
    InputError: the run left none, or a line is damaged.
  """
  path = Path(workdir) / FILE
  if not path.exists():
    raise InputError(f'{path} is missing: the run has not given up')
  # Written whole: no line of it was cut short by a kill.
  rows, damaged = read_lines(path, _row, appended=False)
  if damaged:
    number, line = damaged[0]
    raise InputError(
      f'{path}, line {number} is not a step of a run: {line[:60]!r}; remove the'
      ' line'
    )
  return [_numbers(row) for _, row in rows]


def _row(row: dict) -> dict:
  """Returns a line's row, as `read_lines` wants it."""
  if isinstance(row['step'], int) and isinstance(row['batch'], dict):
    return row
  raise ValueError


def _numbers(value: Any) -> Any:
  """Inverts `_plain`; arrays stay lists."""
  if isinstance(value, dict):
    return {name: _numbers(v) for name, v in value.items()}
  if isinstance(value, list):
    return [_numbers(v) for v in value]
  return float(value) if value in ('nan', 'inf', '-inf') else value
