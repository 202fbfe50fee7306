"""Keeps lines of work that takes long: a program that was ended goes on there.

The first line holds the settings that made the others, so lines of two works
never mix. A last line that a kill has cut is written again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.errors import InputError, naming

_HEAD = 'settings'


class PartialLines:
  """Appends objects of JSON to a file, each on disk before the next is made.

  Attributes:
    rows: what the file holds, in order.
  """

  def __init__(self, path: Path, settings: Mapping[str, Any]):
    """Opens the file, or begins it.

    Args:
      path: the file; folders above it are made.
      settings: all that decides its lines.

    Raises:
      InputError: it was begun with other settings, or a line is damaged.
    """
    self.path, self.rows = path, []
    wanted = json.loads(json.dumps(settings))
    with naming(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      whole = _whole_lines(path)
      if whole:
        head, *self.rows = [_row(path, n, line) for n, line in whole]
        _check(path, head.get(_HEAD), wanted)
      self._file = path.open('a', encoding='utf-8')
      self._file.truncate(sum(len(line) for _, line in whole))
      if not whole:
        self._write({_HEAD: wanted})

  def add(self, row: Mapping[str, Any]) -> None:
    """Appends a row."""
    self.rows.append(dict(row))
    with naming(self.path):
      self._write(row)

  def _write(self, row: Mapping[str, Any]) -> None:
    """Writes a line, and sees to it that it stays."""
    text = json.dumps(row, ensure_ascii=True, allow_nan=False)
    self._file.write(f'{text}\n')
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> 'PartialLines':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Closes the file."""
    self.close()


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
  """Returns (number, line) of the lines that have an end; [] without a file."""
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines(keepends=True)
  return [(n, s) for n, s in enumerate(lines, 1) if s.endswith(b'\n')]


def _row(path: Path, number: int, line: bytes) -> dict:
  """Returns the object of a line; InputError if it is damaged."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    row = None
  if not isinstance(row, dict):
    raise InputError(
      f'{path} line {number}: is damaged; remove the file, and its work is done'
      ' again'
    )
  return row


def _check(path: Path, there: Any, wanted: Mapping[str, Any]) -> None:
  """Raises InputError, with what differs first, for other settings."""
  if there == wanted:
    return
  there = there if isinstance(there, dict) else {}
  name = next(
    n for n in (*wanted, *there) if there.get(n, ()) != wanted.get(n, ())
  )
  shown = lambda some: repr(some[name])[:60] if name in some else 'missing'
  raise InputError(
    f'{path}: was begun with other settings ({name} is {shown(there)} there,'
    f' {shown(wanted)} here); choose another file, or remove it'
  )
