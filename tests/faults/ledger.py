"""What was done to runs, and what came of it."""

import contextlib
import dataclasses


@dataclasses.dataclass
class Row:
  injected: int = 0
  survived: int = 0

  @property
  def lost(self) -> int:
    return self.injected - self.survived


_ROWS: dict[str, Row] = {}


@contextlib.contextmanager
def fault(name: str, times: int = 1):
  """Faults, and then what shows that no number was lost.

  Injected when the body begins, survived when it ends without an error.
  """
  row = _ROWS.setdefault(name, Row())
  row.injected += times
  yield
  row.survived += times


def table() -> list[str]:
  """Lines for the end of a session; none without faults."""
  if not _ROWS:
    return []
  everything = Row(
    sum(row.injected for row in _ROWS.values()),
    sum(row.survived for row in _ROWS.values()),
  )
  width = max(map(len, _ROWS))
  head = f'{"fault":{width}}{"injected":>10}{"survived":>10}{"data lost":>11}'
  rows = [*_ROWS.items(), ('all', everything)]
  return [
    head,
    *(
      f'{name:{width}}{row.injected:10}{row.survived:10}{row.lost:11}'
      for name, row in rows
    ),
  ]
