"""Warns on stderr; progress is in `console`."""

import sys


def warn(line: str) -> None:
  """Prints one line on stderr."""
  print(line, file=sys.stderr, flush=True)
