"""Prints the messages of a run, apart from its progress."""

import sys


def warn(line: str) -> None:
  """Prints one line on stderr."""
  print(line, file=sys.stderr, flush=True)
