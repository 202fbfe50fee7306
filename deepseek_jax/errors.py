"""The error that a user can mend, and what the status of a process means.

Launchers print its one line and exit with status 2; anything else is a defect
and keeps its traceback.
"""

import contextlib
import os
from collections.abc import Iterator

# The same command, started again, goes on from the last checkpoint: preempted
# and saved; a step hung or lost a peer; ended by SIGABRT, as JAX does when a
# peer is silent, by SIGKILL or by SIGTERM. 143 is limited where 77 is not: with
# nothing new saved, a start that takes too long would be repeated for ever.
START_AGAIN = (77, 79, 134, 137, 143)
# It would fail again: a defect, bad input, a run that gave up.
DO_NOT_START_AGAIN = (1, 2, 78)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Adds a path to an OSError that names none, as one of a full disk."""
  try:
    yield
  except OSError as error:
    if error.filename is None:
      error.filename = os.fspath(path)
    raise


class InputError(ValueError):
  """What the user gave is wrong: names the field, the value and the fix."""

  status = 2


class PeerLost(RuntimeError):
  """Another process of the run is gone, and with it a collective."""

  status = 79


class RunAborted(RuntimeError):
  """A run gave up; launchers print the one line and exit with `status`."""

  status = 78


class Preempted(RuntimeError):
  """A run was asked to end and has saved; started again, it goes on."""

  status = 77


class Terminated(Preempted):
  """A run was asked to end before its first step: nothing new is saved."""

  status = 143
