"""Reads files of JSON lines, some of which may be damaged or cut short."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

Row = TypeVar('Row')
# What a parser raises of a line that is not one of its file.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class DamagedLine(NamedTuple):
  """Holds a line that is none of its file, and its number, from 1."""

  number: int
  line: bytes


def read_lines(
  path: Path, parse: Callable[[dict], Row], *, appended: bool = True
) -> tuple[list[tuple[bytes, Row]], list[DamagedLine]]:
  """Returns the lines of a file with their rows, and the damaged ones.

  Args:
    path: the file; may be absent.
    parse: makes a row of a line's JSON; raises ValueError, LookupError,
      TypeError or AttributeError unless it is one.
    appended: the file is written line by line, so that a kill may have cut the
      last one, which is then in neither list.
  """
  if not path.exists():
    return [], []
  *complete, rest = path.read_bytes().split(b'\n')
  if rest and not appended:
    complete.append(rest)
  rows, damaged = [], []
  for number, line in enumerate(complete, 1):
    try:
      rows.append((line, parse(json.loads(line))))
    except _DAMAGED:
      damaged.append(DamagedLine(number, line))
  return rows, damaged
