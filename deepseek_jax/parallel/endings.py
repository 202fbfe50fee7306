"""Ends the processes of one run together, with one status.

The first one to end before its time leaves its status and one line with the
coordination service. A thread in each of the others looks for that and ends its
process alike, so that a scheduler learns the cause, bad input say, and not that
peers were lost.
"""

import concurrent.futures
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from deepseek_jax.errors import PeerLost
from deepseek_jax.parallel import processes as distributed

_END, _LEFT = 'deepseek_jax/end', 'deepseek_jax/left'
_EVERY = 1.0  # seconds between two looks
_GRACE = 10.0  # seconds that a coordinator waits for the others to leave
_REACH = 3.0  # seconds to reach a coordinator that may be gone
_one_at_a_time = threading.Lock()
_in_threads: weakref.WeakSet = weakref.WeakSet()  # that `leave` leaves behind


class Ending(NamedTuple):
  """Describes why a run ended.

  Attributes:
    process: index of the process that ended it.
    status: exit status of that process.
    line: one line for people; '' for none.
  """

  process: int
  status: int
  line: str


def announced() -> Ending | None:
  """Returns how another process or this one ended the run; None if none did."""
  client = distributed.client()
  if client is None:  # it is shut down
    return None
  try:
    return Ending(*json.loads(client.key_value_try_get(_END)))
  except jax.errors.JaxRuntimeError:  # nothing is there, or nobody to ask
    return None


def watch() -> None:
  """Starts the thread that ends this process when another has ended the run.

  Does nothing for a process by itself.
  """
  if not distributed.several():
    return
  import atexit

  over = threading.Event()
  thread = threading.Thread(target=_watch, args=(over,), daemon=True)
  thread.start()
  # It must not ask while the interpreter and the service are taken down.
  atexit.register(lambda: (over.set(), thread.join(_REACH)))


def _watch(over: threading.Event) -> None:
  """Ends the process once another has ended the run, unless `over` is set."""
  while not over.wait(_EVERY):
    ending = announced()
    if ending is not None:
      leave(ending.status, _told(ending))


def _told(ending: Ending) -> str:
  """Returns the line of another process's ending."""
  return ending.line and f'{ending.line} (told by process {ending.process})'


def not_to_wait_for(work: concurrent.futures.Future) -> None:
  """Notes work in a thread, a compilation say, that is of no use any more then.

  The interpreter waits for threads when it ends, in C++ even for daemons.
  """
  _in_threads.add(work)


def leave(status: int, line: str = '') -> None:
  """Prints a line on stderr and ends the process, and with it the whole run.

  An ordinary exit waits for all processes to end, and those would wait for this
  one in a collective.

  Args:
    status: of the process; that which another process gave before wins.
    line: why; '' for nothing.

  Raises:
    SystemExit: in a process by itself, unless work is left that an ordinary
      exit would wait for.
  """
  if not distributed.several():
    if line:
      print(line, file=sys.stderr)
    if not all(work.done() for work in _in_threads):
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
    sys.exit(status)
  with _one_at_a_time:
    ending = Ending(jax.process_index(), status, line)
    first = _within(_REACH, lambda: _announce(ending)) or ending
    # What this one met, as a collective that broke off, is a consequence.
    other = first.status != status or first.line not in line
    if first.process != ending.process and other:
      status, line = first.status, _told(first)
    if line:
      print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.first():
      # Without their coordinator the others are aborted at once.
      _wait_for_others(2.0 if status == PeerLost.status else _GRACE)
    else:
      _within(_REACH, _depart)
    os._exit(status)


def _announce(ending: Ending) -> Ending:
  """Announces an ending unless another process did -> the one that holds."""
  try:
    distributed.client().key_value_set(_END, json.dumps(ending))
    return ending
  except jax.errors.JaxRuntimeError:
    return announced() or ending


def _depart() -> None:
  """Marks this process as gone for the coordinator that waits."""
  key = f'{_LEFT}/{jax.process_index()}'
  distributed.client().key_value_set(key, '', allow_overwrite=True)


def _wait_for_others(seconds: float) -> None:
  """Returns once all other processes have departed, or after `seconds`."""
  until, others = time.monotonic() + seconds, jax.process_count() - 1
  while time.monotonic() < until:
    gone = _within(
      _REACH, lambda: distributed.client().key_value_dir_get(_LEFT)
    )
    if gone is not None and len(gone) >= others:
      break
    time.sleep(0.1)
  time.sleep(0.2)  # for them to exit after their last word


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
  """Returns the result of `ask`; None if it fails or takes longer."""
  answers = []

  def run():
    try:
      answers.append(ask())
    except jax.errors.JaxRuntimeError:
      answers.append(None)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  return answers[0] if answers else None
