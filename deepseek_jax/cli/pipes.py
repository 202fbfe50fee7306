"""Ends a program whose output nobody reads any more, as after `| head`."""

import os
import sys
from typing import NoReturn


def output_is_closed() -> bool:
  """Returns whether the reader of stdout is gone."""
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    return True
  return False


def end_quietly() -> NoReturn:
  """Ends with status 0: what was read was enough."""
  # Python writes what is left at its end; it goes nowhere.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(0)
