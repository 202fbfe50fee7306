"""Scores answers in processes that may be killed, each with a time limit.

A verifier that hangs, raises or ends its process costs one answer: the verdict
says so, and the process is started anew. It is never a silent 0.
"""

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.rl.grading import rewards

_START_SECONDS = 120
_MEBIBYTES = 4096
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Judgement(NamedTuple):
  """Holds the weighted scores of an answer, or why there are none."""

  scores: tuple[float, ...] | None
  error: str | None = None

  @property
  def reward(self) -> float:
    """Returns the sum of the scores; NaN, which enters no mean, on an error."""
    return float('nan') if self.scores is None else float(sum(self.scores))


class _Worker:
  """Holds a child process, and the pipes to it."""

  def __init__(self, rewards: list[dict]):
    """Starts the process; InputError if it does not."""
    # The package without its face: the process must not load JAX. -I: no
    # module of the working directory; what is installed is found as here.
    code = (
      'import sys, types\n'
      f'sys.path += {[p for p in sys.path if p]!r}\n'
      f"for name, path in (('deepseek_jax', {_PACKAGE!r}),"
      f" ('deepseek_jax.rl', {os.path.join(_PACKAGE, 'rl')!r})):\n"
      '  sys.modules[name] = types.ModuleType(name)\n'
      '  sys.modules[name].__path__ = [path]\n'
      'from deepseek_jax.rl.grading import worker\n'
      f'worker.main({_MEBIBYTES})\n'
    )
    self._process = subprocess.Popen(
      [sys.executable, '-I', '-c', code],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      encoding='utf-8',
      start_new_session=True,  # Ctrl-C is for the launcher
    )
    # Also where nobody closes the judge.
    self._end = weakref.finalize(self, _stop, self._process)
    if self.ask(rewards, _START_SECONDS) is None:
      raise InputError(
        f'rewards: the process that scores answers did not start'
        f' ({sys.executable} ended with {self._process.returncode})'
      )

  def ask(self, request: Any, seconds: float) -> dict | None:
    """Returns the reply; None if the process ended or took too long."""
    clock = threading.Timer(seconds, _kill, [self._process])
    clock.daemon = True
    clock.start()
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      line = self._process.stdout.readline()
      return json.loads(line) if line.endswith('\n') else None
    except (OSError, ValueError):
      return None
    finally:
      clock.cancel()

  @property
  def alive(self) -> bool:
    """Returns whether the process still runs."""
    return self._process.poll() is None

  def stop(self) -> None:
    """Ends the process and frees what it held."""
    self._end()


def _kill(process: subprocess.Popen) -> None:
  """Ends a process and those that it has started: they hold its pipes."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except (OSError, AttributeError):  # gone already; no groups on Windows
    process.kill()


def _stop(process: subprocess.Popen) -> None:
  """Ends a process and closes the pipes to it."""
  _kill(process)
  process.wait()
  for pipe in (process.stdin, process.stdout):
    try:
      pipe.close()
    except OSError:
      continue  # a request that was not read


@dataclasses.dataclass
class Judge:
  """Scores answers by the rewards of a task.

  Attributes:
    rewards: as a task file has them, see `rewards.read`.
    seconds: by the clock, of one answer.
    processes: that score at a time.
    errors: answers without a score so far.
    scored: answers with one.
  """

  rewards: Sequence[Mapping[str, Any]]
  seconds: float = 10.0
  processes: int = 1
  errors: int = dataclasses.field(default=0, init=False)
  scored: int = dataclasses.field(default=0, init=False)

  def __post_init__(self) -> None:
    """Raises InputError for rewards that are none."""
    self.names = [r.kind for r in rewards.read(self.rewards, 'rewards')]
    if self.processes < 1 or not self.seconds > 0:
      raise InputError(
        f'judge: processes = {self.processes} and seconds = {self.seconds}:'
        ' must be at least 1 and above 0'
      )
    self._plain = [dict(r) for r in self.rewards]
    self._workers: list[_Worker | None] = [None] * self.processes

  def __call__(self, answers: Sequence[tuple[str, Mapping]]) -> list[Judgement]:
    """Returns the verdicts on (text, problem) pairs, in order."""
    share = lambda n: [
      (i, self._one(n, *answers[i]))
      for i in range(n, len(answers), self.processes)
    ]
    with concurrent.futures.ThreadPoolExecutor(self.processes) as pool:
      parts = list(pool.map(share, range(self.processes)))
    out = [v for _, v in sorted(p for part in parts for p in part)]
    wrong = sum(v.error is not None for v in out)
    self.errors += wrong
    self.scored += len(out) - wrong
    return out

  def _one(self, number: int, text: str, problem: Mapping) -> Judgement:
    """Returns the verdict of one process on one answer."""
    worker = self._workers[number]
    if worker is not None and not worker.alive:  # a clock that was too late
      self._end(number)
    if self._workers[number] is None:
      self._workers[number] = _Worker(self._plain)
    worker = self._workers[number]
    request = {'text': text, 'problem': dict(problem)}
    try:
      reply = worker.ask(request, self.seconds)
    except BaseException:  # a reply would meet the wrong request
      self._end(number)
      raise
    if reply is None:
      self._end(number)
      why = f'took more than {self.seconds} s, or ended its process'
      return Judgement(None, why)
    if 'scores' not in reply:
      return Judgement(None, reply.get('error', 'no reply'))
    return Judgement(tuple(reply['scores']))

  def _end(self, number: int) -> None:
    """Ends a process; the next answer starts another."""
    worker, self._workers[number] = self._workers[number], None
    if worker is not None:
      worker.stop()

  def close(self) -> None:
    """Ends the processes."""
    for number in range(self.processes):
      self._end(number)

  def __enter__(self) -> 'Judge':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Ends the processes."""
    self.close()
