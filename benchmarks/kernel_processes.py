"""Runs a stage in a process of its own, for no longer than its limit."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable

_running: set[subprocess.Popen] = set()
_over = threading.Event()


def begin() -> None:
  """Lets stages run, after `end_all`, too."""
  _over.clear()


def is_over() -> bool:
  """Says whether all stages have been ended."""
  return _over.is_set()


def end_all() -> None:
  """Ends all stages that still run; none is begun any more."""
  _over.set()
  for process in list(_running):
    _end(process)


def _end(process: subprocess.Popen) -> None:
  """Ends a process and what it has started."""
  _running.discard(process)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _found(text: str) -> dict | None:
  """The last row that a stage has printed whole."""
  for line in reversed(text.splitlines()):
    if line.startswith('{'):
      with contextlib.suppress(ValueError):
        return json.loads(line)
  return None


class _Clock:
  """Ends a process once its limit is over."""

  def __init__(self, process: subprocess.Popen):
    self.stopped: float | None = None  # the limit that it went over
    self._process, self._timer = process, None

  def start(self, limit: float) -> None:
    """Begins to count anew."""
    self.stop()
    self._timer = threading.Timer(max(limit, 1), self._over, [limit])
    self._timer.start()

  def stop(self) -> None:
    if self._timer:
      self._timer.cancel()

  def _over(self, limit: float) -> None:
    self.stopped = limit
    _end(self._process)


def last_row(
  argv: list[str], limit: float, ready: Callable[[], float] | None = None
) -> dict:
  """The last row that a command prints, with 'failed' where it came to grief.

  Args:
    argv: the command.
    limit: seconds; then it is ended, and its row gets 'stopped'. What was
      measured before stands.
    ready: called when the command says {"ready": true}; gives the seconds from
      then on. The command goes on when it reads a line; where no second is left
      it is ended, and its row is {'late': True}, as where all are over.
  """
  if is_over():
    return {'late': True}
  with tempfile.TemporaryFile('w+') as err:
    # A group of its own, for a compiler may have processes, too.
    process = subprocess.Popen(
      argv,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=err,
      text=True,
      start_new_session=True,
    )
    _running.add(process)
    if is_over():  # meanwhile
      _end(process)
    clock, lines, late = _Clock(process), [], False
    clock.start(limit)
    try:
      for line in process.stdout:
        if ready is None or _found(line) != {'ready': True}:
          lines.append(line)
          continue
        clock.stop()
        limit = ready()
        if late := limit <= 0:
          break
        clock.start(limit)
        # It may have ended meanwhile.
        with contextlib.suppress(BrokenPipeError):
          process.stdin.write('\n')
          process.stdin.flush()
      status = None if late else process.wait()
    finally:
      clock.stop()
      _end(process)
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
      process.stdout.close()
    err.seek(0)
    said = err.read()
  if late:
    return {'late': True}
  row = _found(''.join(lines)) or {}
  if clock.stopped is not None:
    row = row | {'stopped': round(limit, 1)}
    if 'us' not in row:
      row.setdefault('failed', f'stopped after {limit:.0f} s')
  elif status and 'failed' not in row:
    row['failed'] = f'ended with {status}: {" ".join(said.split())[-300:]}'
  elif not row:
    row['failed'] = 'printed no row'
  return row
