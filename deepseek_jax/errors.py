"""Defines the errors that a user can fix, and what a process's status means.

Launchers print an error's one line and exit with its status, 2 for an
InputError; anything else is a defect and keeps its traceback.
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


def told(value: object) -> str:
  """Returns what a value of the wrong type is, in a few words."""
  if callable(value) and hasattr(value, '__name__'):
    return f'the {type(value).__name__} {value.__name__}'
  text = repr(value)
  return text if len(text) <= 60 else f'a {type(value).__name__}'


def install(extra: str) -> str:
  """Returns how the packages of an extra are installed."""
  return (
    f'the extra {extra!r}: pip install ".[{extra}]" in the checkout, or'
    f' "WHEEL[{extra}]"'
  )


def check_type(name: str, value: object, cls: type, fix: str) -> None:
  """Raises InputError unless `value` is a `cls`; `fix` says what to give."""
  if not isinstance(value, cls):
    raise InputError(f'{name}: is {told(value)}, no {cls.__name__}; {fix}')


class InputError(ValueError):
  """Reports wrong input of the user: names the field, the value and the fix."""

  status = 2


class PeerLost(RuntimeError):
  """Reports that another process is gone, and with it a collective."""

  status = 79


class RunAborted(RuntimeError):
  """Reports that a run gave up.

  Launchers print the one line and exit with `status`.
  """

  status = 78


class Preempted(RuntimeError):
  """Reports a run that was asked to end and has saved.

  Started again, it goes on.
  """

  status = 77


class Terminated(Preempted):
  """Reports a run that was asked to end before its first step.

  Nothing new is saved.
  """

  status = 143
