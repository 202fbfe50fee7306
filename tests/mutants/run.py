"""Applies each known bug to a copy of the library and runs its tests there.

    python -m tests.mutants.run [--fast] [--jobs=2] [NAME ...]

Prints a table: killed (a test failed on an assertion), survived, or why the
verdict means nothing: the patch no longer applies, a test crashed or is gone,
the tests fail without the bug too. Ends with status 1 unless all are killed.
The working tree is never touched.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.catalog import MUTANTS
from tests.mutants.mutant import ROOT, Mutant, mutated, selection

COPIED = ('deepseek_jax', 'pallas_kernels', 'experiments', 'tests')
SECONDS = 240  # for the tests of one mutant
SOUND_SECONDS = 1200  # for all that mutants name of a file
OUTPUT = 'output.txt'

# Each run is a process of its own, forked from a server that has imported
# what no mutant changes: that takes longer than most of the tests.
PRELOADED = ['jax', 'flax.nnx', 'optax', 'absl.testing.parameterized', 'pytest']
_PROCESSES = multiprocessing.get_context('forkserver')


def copy(folder: str) -> None:
  """The code and its tests; compiled files come along, for they save time."""
  for name in COPIED:
    shutil.copytree(ROOT / name, Path(folder, name))
  shutil.copy(ROOT / 'pyproject.toml', folder)


def _child(folder: str, tests: tuple[str, ...]) -> None:
  """Runs pytest on the copy in `folder`; ends with pytest's status."""
  sink = os.open(Path(folder, OUTPUT), os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(sink, stream)
  os.chdir(folder)
  os.environ['PYTHONPATH'] = folder  # for what the tests start
  os.environ['COLUMNS'] = '400'  # keeps the reasons whole
  sys.dont_write_bytecode = True
  sys.path[:] = [folder, *(p for p in sys.path if p and Path(p) != ROOT)]
  for name in list(sys.modules):
    if name.partition('.')[0] in COPIED:
      del sys.modules[name]
  import pytest

  options = ['-x', '--tb=no', '-rfE', '-p', 'no:cacheprovider']
  sys.exit(pytest.main([*options, *selection(tests)]))


def pytest_on(
  folder: str, tests: tuple[str, ...], seconds: float = SECONDS
) -> tuple[int, str]:
  """Status of pytest on the copy in `folder`, and what it printed."""
  process = _PROCESSES.Process(target=_child, args=(folder, tests))
  process.start()
  process.join(seconds)
  if process.exitcode is None:
    process.kill()
    process.join()
    return -1, f'no end after {seconds} s'
  output = Path(folder, OUTPUT)
  text = output.read_text(errors='replace') if output.exists() else ''
  return process.exitcode, text


def verdict(status: int, output: str) -> str:
  """What a run of pytest says about the mutant it ran on."""
  if status == 0:
    return 'survived'
  # A part of a test has its name in brackets, or its arguments.
  failed = r'^(?:FAILED|SUBFAILED.*?) \S+\.py::\S+(?: - (.*))?$'
  reason = re.search(failed, output, re.MULTILINE)
  if status == 1 and reason:
    said = reason[1] or ''
    # A test that dies of another error has checked no number.
    if said.startswith(('AssertionError', 'assert ')):
      return 'killed'
    return f'crashed: {said}'
  lines = output.strip().splitlines() or ['no output']
  return f'no verdict (status {status}): {lines[-1]}'


def judge(mutant: Mutant) -> str:
  """The verdict on one mutant."""
  try:
    text = mutated(mutant, (ROOT / mutant.path).read_text())
  except (ValueError, OSError) as error:
    return f'does not apply: {error}'
  with tempfile.TemporaryDirectory() as folder:
    copy(folder)
    Path(folder, mutant.path).write_text(text)
    return verdict(*pytest_on(folder, mutant.tests))


def sound(tests: tuple[str, ...]) -> str:
  """Whether tests pass without a bug."""
  with tempfile.TemporaryDirectory() as folder:
    copy(folder)
    status, output = pytest_on(folder, tests, SOUND_SECONDS)
  return 'sound' if status == 0 else f'unsound: {verdict(status, output)}'


def tests_by_file(mutants: list[Mutant]) -> dict[str, tuple[str, ...]]:
  """The tests that mutants name, once each."""
  out = {}
  for test in dict.fromkeys(test for m in mutants for test in m.tests):
    out.setdefault(test.partition('::')[0], []).append(test)
  return {file: tuple(tests) for file, tests in sorted(out.items())}


def _timed(task, argument):
  start = time.perf_counter()
  return task(argument), time.perf_counter() - start


def run(mutants: list[Mutant], jobs: int, baseline: bool) -> bool:
  """Prints the table; whether every mutant was killed."""
  tasks = [(m.name, judge, m) for m in mutants]
  if baseline:
    tasks += [(f, sound, tests) for f, tests in tests_by_file(mutants).items()]
  width = max(len(name) for name, *_ in tasks)
  good = 0
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    running = [(name, pool.submit(_timed, *task)) for name, *task in tasks]
    for name, future in running:
      said, seconds = future.result()
      good += said in ('killed', 'sound')
      print(f'{name:<{width}}  {seconds:6.1f} s  {said}', flush=True)
  print(
    f'{good} of {len(tasks)} as they should be: mutants killed, and the tests'
    ' sound without them'
  )
  return good == len(tasks)


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('names', nargs='*', help='only these mutants')
  parser.add_argument('--fast', action='store_true', help='the fast ones')
  parser.add_argument('--jobs', type=int, default=2)
  options = parser.parse_args(arguments)
  unknown = set(options.names) - {m.name for m in MUTANTS}
  if unknown:
    print(f'no such mutants: {", ".join(sorted(unknown))}', file=sys.stderr)
    return 2
  chosen = [
    m
    for m in MUTANTS
    if (not options.names or m.name in options.names)
    and (m.fast or not options.fast)
  ]
  _PROCESSES.set_forkserver_preload(PRELOADED)
  # `make test` runs the tests themselves, so fast runs need no second look.
  return 0 if run(chosen, options.jobs, not options.fast) else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
