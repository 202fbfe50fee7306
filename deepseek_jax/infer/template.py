"""Renders chat templates in a child process with limits.

One small process (`template_worker`) renders all templates of this one. It is
started when first needed, not forked: threads, a notebook or a test runner
don't matter to it. A template that takes too long or too much memory costs
that process, and the next one gets another.
"""

import atexit
import dataclasses
import importlib.util
import json
import marshal
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.infer import template_worker

SECONDS = 5  # of CPU time for one text
WALL_FACTOR = 12  # times that by the clock, on a busy machine
START_SECONDS = 120
MEBIBYTES = 256
MAX_TEXT = 1 << 24  # characters


class _Worker:
  """Holds the child process, and the pipes to it."""

  def __init__(self):
    """Starts the process and waits for it; RuntimeError if it fails."""
    self.pid = os.getpid()
    # -I: no module of the working directory or of the environment.
    where = [
      os.path.dirname(os.path.dirname(importlib.util.find_spec(name).origin))
      for name in ('jinja2', 'markupsafe')
    ]
    code = (
      f'import sys, runpy; sys.path += {where!r}; '
      f'runpy.run_path({template_worker.__file__!r}, run_name="__main__")'
    )
    self.process = subprocess.Popen(
      [sys.executable, '-I', '-B', '-c', code],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    reply = self._receive(START_SECONDS)
    if reply is None:
      self.stop()
      raise RuntimeError(
        f'the process for chat templates did not start: {sys.executable}'
        f' ended with {self.process.returncode}'
      )

  def ask(self, request: tuple) -> tuple[str | None, str | None]:
    """Returns (text, None) or (None, why there is none)."""
    body = marshal.dumps(request)  # keeps tuples apart from lists; pure data
    seconds, mebibytes = request[2:4]
    try:
      self.process.stdin.write(struct.pack('<I', len(body)) + body)
      self.process.stdin.flush()
      reply = self._receive(seconds * WALL_FACTOR)
    except (BrokenPipeError, ConnectionResetError):
      reply = None
    if reply is None:
      self.stop()
      return None, _ending(self.process.returncode, seconds, mebibytes)
    if reply == [None, 'memory']:
      self.stop()  # what is left of its memory may be in pieces
      return None, f'takes more than {mebibytes} MiB of memory'
    return tuple(reply)

  def _receive(self, seconds: float) -> list | None:
    """Returns the next answer; None if the process ended or took too long."""
    clock = threading.Timer(seconds, self.process.kill)
    clock.daemon = True
    clock.start()
    try:
      head = self.process.stdout.read(4)
      if len(head) < 4:
        return None
      (size,) = struct.unpack('<I', head)
      body = self.process.stdout.read(size)
      return json.loads(body) if len(body) == size else None
    finally:
      clock.cancel()

  def stop(self) -> None:
    """Ends the process and frees what it held."""
    self.process.kill()
    self.process.wait()
    for pipe in (self.process.stdin, self.process.stdout):
      try:
        pipe.close()
      except BrokenPipeError:
        continue  # a request that was not read


def _ending(code: int | None, seconds: float, mebibytes: int) -> str:
  """Returns why the child process ended, by its exit code."""
  if code in (-getattr(signal, 'SIGXCPU', 0), -signal.SIGKILL):
    return f'takes more than {seconds} s, or more memory than there is'
  return (
    f'ended its process (status {code}): nested too deeply, or more than'
    f' {mebibytes} MiB of memory'
  )


_lock = threading.Lock()
_worker: _Worker | None = None


def _of_this_process() -> _Worker:
  """Returns the child of this process, started if there is none."""
  global _worker
  if _worker is not None and _worker.pid != os.getpid():
    # This process is a fork: the child and its pipes are the parent's.
    for pipe in (_worker.process.stdin, _worker.process.stdout):
      pipe.close()
    _worker.process.returncode = 0
    _worker = None
  if _worker is not None and _worker.process.poll() is not None:
    _worker.stop()
    _worker = None
  if _worker is None:
    _worker = _Worker()
  return _worker


@atexit.register
def stop() -> None:
  """Ends the child process; the next template starts another."""
  global _worker
  with _lock:
    if _worker is not None and _worker.pid == os.getpid():
      _worker.stop()
    _worker = None


def _after_fork() -> None:
  """Replaces the lock in a forked process."""
  global _lock
  _lock = threading.Lock()  # another thread may have held it


if hasattr(os, 'register_at_fork'):
  os.register_at_fork(after_in_child=_after_fork)


def plain(value: Any) -> Any:
  """Returns a value as the template may see it: JSON types, tuples, no more.

  Any other object becomes a text that names its type, as in transformers.
  """
  if value is None or type(value) in (str, int, float, bool):
    return value
  if isinstance(value, np.generic):
    return plain(value.item())
  for kind in (str, int, float):
    if isinstance(value, kind):  # a subclass may carry methods
      return kind.__new__(kind, value)
  if isinstance(value, Mapping):
    return {plain(key): plain(item) for key, item in value.items()}
  if isinstance(value, list):
    return [plain(item) for item in value]
  if isinstance(value, tuple):
    return tuple(plain(item) for item in value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    return {f.name: plain(getattr(value, f.name)) for f in fields}
  return f'<{type(value).__name__}>'


def render(template: str, variables: Mapping[str, Any]) -> str:
  """Returns the text of a template.

  Args:
    template: Jinja, as published.
    variables: what it knows; see `plain`.

  Raises:
    InputError: the template is wrong, forbidden, refuses, or takes more than
      SECONDS, MEBIBYTES or MAX_TEXT.
  """
  try:
    known = plain(variables)
    request = (template, known, SECONDS, MEBIBYTES, MAX_TEXT)
    marshal.dumps(request)
  except (ValueError, RecursionError):
    raise InputError('chat_template: messages nested too deeply') from None
  with _lock:
    worker = _of_this_process()
    try:
      text, error = worker.ask(request)
    except BaseException:  # Ctrl-C: an answer would meet the wrong request
      worker.stop()
      raise
  if error is not None:
    raise InputError(f'chat_template: {error}')
  return text
