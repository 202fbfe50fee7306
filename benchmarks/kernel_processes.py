"""Runs a stage in a process of its own, for no longer than its limit."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile

_running: set[subprocess.Popen] = set()


def end_all() -> None:
  """Ends all stages that still run."""
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


def last_row(argv: list[str], limit: float) -> dict:
  """The last row that a command prints, with 'failed' where it came to grief.

  Args:
    argv: the command.
    limit: seconds; then it is ended, and its row gets 'stopped'. What was
      measured before stands.
  """
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    # A group of its own, for a compiler may have processes, too.
    process = subprocess.Popen(
      argv, stdout=out, stderr=err, start_new_session=True
    )
    _running.add(process)
    stopped = False
    try:
      status = process.wait(max(limit, 1))
    except subprocess.TimeoutExpired:
      stopped, status = True, None
    finally:
      _end(process)
    texts = []
    for file in (out, err):
      file.seek(0)
      texts.append(file.read())
  row = _found(texts[0]) or {}
  if stopped:
    row = row | {'stopped': round(limit, 1)}
    if 'us' not in row:
      row.setdefault('failed', f'stopped after {limit:.0f} s')
  elif status and 'failed' not in row:
    last = ' '.join(texts[1].split())[-300:]
    row['failed'] = f'ended with {status}: {last}'
  elif not row:
    row['failed'] = 'printed no row'
  return row
