"""How do time and memory grow with tokens, experts, layers and the batch?

    python -m benchmarks.growth [--only=tokens/DSA] [--again] [--rounds=3]

Each point runs in a process of its own, so that its peak memory is its own, and
is written to growth.json as it ends: stopped and called again, it goes on with
what is missing. --only takes the points whose names begin so, and --again
measures them anew. Ends with growth.md and growth.png of all that is known.

A record has wall and processor seconds of a call (medians), of compiling, the
bytes that XLA's program holds beside its inputs, and the peak of the process.
"""

import argparse
import datetime
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

from benchmarks import growth_report
from benchmarks.growth_points import Point, described, points, program
from benchmarks.machine import processor


def clock() -> tuple[float, float]:
  """Returns wall seconds, and user and system seconds of this process."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return time.perf_counter(), used.ru_utime + used.ru_stime


def since(start: tuple[float, float]) -> tuple[float, float]:
  """Returns the seconds since `clock` was asked: wall, processor."""
  return tuple(now - then for now, then in zip(clock(), start))


def measure(point: Point, rounds: int) -> dict:
  """Returns the record of a point, measured in this process."""
  import jax

  call, arguments = program(point)
  start = clock()
  compiled = call.lower(*arguments).compile()
  compile_wall, compile_cpu = since(start)
  walls, cpus = [], []
  for _ in range(rounds + 1):
    start = clock()
    out = jax.block_until_ready(compiled(*arguments))
    wall, cpu = since(start)
    walls.append(wall)
    cpus.append(cpu)
    if point.study != 'tokens':  # the state was donated
      arguments = (out[0], *arguments[1:])
    del out
  memory = compiled.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    # The first round warms up.
    'seconds': statistics.median(walls[1:]),
    'processor_seconds': statistics.median(cpus[1:]),
    'rounds': walls[1:],
    'compile_seconds': compile_wall,
    'compile_processor_seconds': compile_cpu,
    'program_bytes': memory.temp_size_in_bytes + results,
    'peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    'jax': jax.__version__,
  }


def in_process(point: Point, options: argparse.Namespace) -> dict | None:
  """Returns the record of a point, measured alone; None if that failed."""
  command = [sys.executable, '-m', 'benchmarks.growth', f'--point={point.key}']
  command.append(f'--rounds={options.rounds}')
  try:
    done = subprocess.run(
      command, stdout=subprocess.PIPE, text=True, timeout=options.seconds
    )
  except subprocess.TimeoutExpired:
    print(f'{point.key}: took more than {options.seconds:.0f} s', flush=True)
    return None
  lines = [one for one in done.stdout.splitlines() if one.startswith('@')]
  if done.returncode or not lines:
    print(f'{point.key}: ended with status {done.returncode}', flush=True)
    return None
  when = datetime.date.today().isoformat()
  return {
    **point._asdict(),
    **json.loads(lines[-1][1:]),
    'machine': processor(),
    'date': when,
    'commit': commit(),
  }


def commit() -> str:
  """Returns the commit that is measured, with + where files differ from it."""
  ask = lambda *words: subprocess.run(
    ['git', *words], capture_output=True, text=True
  ).stdout.strip()
  changed = '+' if ask('status', '--porcelain', '--', 'deepseek_jax') else ''
  return ask('rev-parse', '--short', 'HEAD') + changed


def parsed(arguments: list[str]) -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--only', default='', help='how the names begin')
  parser.add_argument('--again', action='store_true')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=1200.0, help='a point')
  parser.add_argument('--out', default='benchmarks/results')
  parser.add_argument('--report', action='store_true', help='measure nothing')
  parser.add_argument('--point', help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
  """Measures what is missing, and reports."""
  options = parsed(arguments)
  by_key = {point.key: point for point in points()}
  if options.point:
    print('@' + json.dumps(measure(by_key[options.point], options.rounds)))
    return 0
  asked = [key for key in by_key if key.startswith(options.only)]
  if not asked or options.rounds < 1:
    known = sorted({key.rpartition('/')[0] for key in by_key})
    print(f'--only: one of {known}; --rounds: at least 1', file=sys.stderr)
    return 2
  path = pathlib.Path(options.out) / 'growth.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  known = json.loads(path.read_text())['records'] if path.exists() else {}
  failed = False
  for key in asked:
    if options.report or (key in known and not options.again):
      continue
    record = in_process(by_key[key], options)
    if record is None:
      failed = True
      continue
    known[key] = record
    print(growth_report.line(record), flush=True)
    scratch = path.with_suffix('.tmp')
    made = {'shapes': described(), 'records': known}
    scratch.write_text(json.dumps(made, indent=1) + '\n')
    scratch.replace(path)
  records = [known[key] for key in by_key if key in known]
  if records:
    growth_report.write(records, path.parent)
    print(growth_report.table(records))
  return int(failed)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
