"""What a run has to say, but for its progress."""

import sys


def warn(line: str) -> None:
  """One line on stderr."""
  print(line, file=sys.stderr, flush=True)
