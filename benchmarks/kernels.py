"""Every kernel on one GPU, in a window of minutes: error, time, share of floor.

  python -m benchmarks.kernels [--seconds=545] [--only=OP,OP/SHAPE]
    [--out=benchmarks/results]

First all ops are checked on fresh random numbers, several at a time, against
float32 on a smaller shape; a result that is not finite where it should be is
wrong. Then the right ones are timed, most valuable first (kernel_plan), each
row in a process of its own with a time limit: a hang, a crash or a poisoned
CUDA context costs that row alone. While one is timed, alone on the device, the
next ones compile. The file of results is written after every
row, and keeps the rows of earlier runs that this one does not replace.

Times are medians of device time (CUPTI) without gaps between kernels; a library
of torch is timed by CUDA events. What fills a cache gets it donated. The floor
is the larger of useful FLOPs over the rate of a large matmul in the operands'
dtype (float8: twice bfloat16's) and bytes over the rate of a large copy, both
measured in the same run on random numbers.

Ends with 1 if a kernel is wrong or fails, with 2 without a GPU or for flags
that make no sense. --interpret runs the small shapes in the interpreter, to
test itself, and times nothing.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

from benchmarks import kernel_plan, kernel_processes, kernel_report
from benchmarks.kernel_plan import Case

# Of an H200, measured once on random numbers; where this run's fails.
_ASSUMED = {'flops': 7.9e14, 'bytes': 4.2e12, 'how': 'assumed'}
_END = 5  # seconds that the last words take
_LEAST = 20  # seconds that a row takes at least: later none is begun


@dataclasses.dataclass
class Window:
  """A run: what is left of its time, and what it has found.

  Attributes:
    flags: of the command line.
    end: when it has to be over, by time.monotonic.
    report: device, floors and all rows, this run's and those kept.
    path: of the file of results, without its ending.
    bad: names of this run's rows that are wrong or failed.
  """

  flags: argparse.Namespace
  end: float
  report: kernel_report.Report
  path: pathlib.Path
  bad: list[str] = dataclasses.field(default_factory=list)

  @property
  def left(self) -> float:
    return self.end - time.monotonic()

  def keep(self, case: Case, row: dict) -> None:
    """Takes a row into the report, writes it, and shows it."""
    row = row | {'date': datetime.date.today().isoformat()}
    self.report.put(case, row)
    kernel_report.write(self.report, self.path)
    if 'failed' in row:
      self.bad.append(case.name)
    print(json.dumps({'op': case.op, 'shape': case.shape} | row), flush=True)


def child(stage: str, case: Case | None = None, **more) -> list[str]:
  """The command line of a stage."""
  asked = {'stage': stage, **more}
  if case:
    asked |= {'op': case.op, 'shape': case.shape}
    asked['contenders'] = list(case.contenders)
  return [sys.executable, '-m', 'benchmarks.kernel_stage', json.dumps(asked)]


@contextlib.contextmanager
def several(count: int) -> Iterator[concurrent.futures.Executor]:
  """A pool of threads for stages; an exception ends all of them."""
  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    try:
      yield pool
    except BaseException:
      kernel_processes.end_all()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def check(window: Window, cases: list[Case]) -> dict[str, dict]:
  """Checks every op on its first shape: {op: row}.

  What the time for checks does not reach is checked when it is timed.
  """
  flags, first = window.flags, {}
  for case in cases:
    first.setdefault(case.op, case)
  stop = time.monotonic() + min(flags.check, max(window.left - _LEAST, 0))

  def one(case: Case) -> tuple[Case, dict | None]:
    # Compiling takes most of it, and is a CPU's work: several side by side.
    limit = 1.5 * flags.limit * case.patience
    limit = min(limit, stop - time.monotonic())
    if limit <= 0:
      return case, None
    return case, kernel_processes.last_row(child('check', case), limit)

  found = {}
  with several(flags.jobs) as pool:
    jobs = [pool.submit(one, case) for case in first.values()]
    for job in concurrent.futures.as_completed(jobs):
      case, row = job.result()
      # Cut short by the end of all checks it says nothing.
      if row is None or (row.get('stopped') and time.monotonic() >= stop):
        print(f'{case.op}: no time left to check it first', flush=True)
        continue
      found[case.op] = row | {'shape': case.shape}
      window.keep(case, row)
  return found


class Turns:
  """Lets those that prepare side by side measure alone, one after another."""

  def __init__(self):
    self._next, self._moved = 0, threading.Condition()

  def wait(self, place: int) -> None:
    """Waits until all before this place are done."""
    with self._moved:
      self._moved.wait_for(lambda: self._next == place)

  def done(self, place: int) -> None:
    """Lets the next one go."""
    with self._moved:
      self._next = place + 1
      self._moved.notify_all()


def time_rows(
  window: Window, cases: list[Case], found: dict[str, dict]
) -> list[str]:
  """Times the right ones in order; names of those without time left.

  While one has the device to itself, the next ones import and compile.
  """
  flags, late, turns = window.flags, [], Turns()
  checked = {(op, row['shape']) for op, row in found.items()}
  cases = [c for c in cases if 'failed' not in found.get(c.op, {})]

  def one(place: int, case: Case) -> None:
    known = (case.op, case.shape) in checked
    argv = child('time', case, checked=known, rates=window.report.floors)
    limit = flags.limit * case.patience

    def ready() -> float:
      turns.wait(place)
      left = window.left - _END
      return 0 if left < _LEAST / 2 else min(limit, left)

    try:
      row = {'late': True}
      if window.left >= _LEAST:
        limits = limit, window.left - _END
        row = kernel_processes.last_row(argv, min(limits), ready)
      turns.wait(place)
      if kernel_processes.is_over():
        return
      # Cut short by the window's end it says nothing, unless it has a time.
      cut = 'stopped' in row and 'us' not in row and window.left < _END + 1
      if cut or row == {'late': True}:
        late.append(case.name)
      else:
        window.keep(case, (found[case.op] if known else {}) | row)
    finally:
      turns.wait(place)
      turns.done(place)

  with several(1 + flags.ahead) as pool:
    for job in [pool.submit(one, *a) for a in enumerate(cases)]:
      job.result()
  return late


def run(flags: argparse.Namespace, cases: list[Case]) -> int:
  """The whole window; the status to end with."""
  end = time.monotonic() + flags.seconds
  try:
    flags.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    print(f'benchmarks.kernels: --out={flags.out}: {error}', file=sys.stderr)
    return 2
  row = kernel_processes.last_row(
    child('floor'), min(flags.limit, flags.seconds)
  )
  if 'device' not in row:
    print(f'benchmarks.kernels: {row["failed"]}', file=sys.stderr)
    return 2
  floors = {k: row.get(k, assumed) for k, assumed in _ASSUMED.items()}
  path = kernel_report.path_of(flags.out, row['device'], row['jax'])
  try:
    old = kernel_report.read(path)
  except ValueError as error:
    print(f'benchmarks.kernels: {error}', file=sys.stderr)
    return 2
  window = Window(flags, end, old.of_now(row, floors), path)
  if 'failed' in row:
    print(f'floor: {row["failed"]}; {_ASSUMED} assumed', file=sys.stderr)
    window.bad.append('floor')
  found = check(window, cases)
  late = time_rows(window, cases, found)
  print(kernel_report.table(window.report))
  if late:
    print(f'no time left for {len(late)} rows: {", ".join(late)}')
  if window.bad:
    print(f'wrong or failed: {", ".join(dict.fromkeys(window.bad))}')
  return 1 if window.bad else 0


def interpret(cases: list[Case]) -> int:
  """Checks the first shape of every op in the interpreter."""
  from benchmarks import kernel_stage
  from pallas_kernels import compat

  seen, status = set(), 0
  with compat.interpreted():
    for case in cases:
      if case.op in seen:
        continue
      seen.add(case.op)
      row = kernel_stage.checked(case.op, case.shape)
      status |= 'failed' in row
      print(json.dumps({'op': case.op, 'shape': case.shape} | row), flush=True)
  return int(status)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog='benchmarks.kernels', description=__doc__.partition('\n')[0]
  )
  text = 'benchmarks/results'
  parser.add_argument('--only', default='', help='OP or OP/SHAPE, with commas')
  parser.add_argument('--out', default=text, type=pathlib.Path, help=text)
  parser.add_argument('--seconds', default=545, type=float, help='for all')
  parser.add_argument('--check', default=150, type=float, help='for checks')
  parser.add_argument('--limit', default=60, type=float, help='for a row')
  parser.add_argument('--jobs', default=6, type=int, help='checks at a time')
  parser.add_argument('--ahead', default=4, type=int, help='rows that compile')
  parser.add_argument('--interpret', action='store_true')
  flags = parser.parse_args(argv)
  for name in ('seconds', 'check', 'limit', 'jobs'):
    if not getattr(flags, name) > 0:
      parser.error(f'--{name}={getattr(flags, name)}: must be above 0')
  try:
    cases = kernel_plan.chosen(flags.only)
  except ValueError as error:
    parser.error(str(error))
  if flags.interpret:
    # A thread for each warpgroup: read when XLA starts.
    os.environ.setdefault('NPROC', '8')
    return interpret(cases)
  # `timeout` and the like send this; the stages have groups of their own.
  kernel_processes.begin()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    return run(flags, cases)
  finally:
    kernel_processes.end_all()


if __name__ == '__main__':
  # Children run side by side: none may take all of the memory.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  sys.exit(main(sys.argv[1:]))
