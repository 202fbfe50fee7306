"""How soon is the demo good? Seconds to 1.8, 1.7, 1.6 and 1.5 bits per byte.

    python -m benchmarks.speedrun --name=demo
    python -m benchmarks.speedrun --name=wide --set=model.dim=320 [--seeds=3]
    python -m benchmarks.speedrun --name=wide --final [--seeds=3]
    python -m benchmarks.speedrun --report

An arm is the demo's recipe with fields changed (--set, values as in Python;
those of one call depend on each other). Its text is the demo's, and so is the
rule of bits per byte. Without --final twice as many documents are held out, and
those that the demo would train on are read to choose between arms: the held-out
files of the demo choose nothing. With --final an arm trains on what the demo
trains on, and the demo's held-out files are read.

The clock runs while steps do: not while the step is compiled (told beside it)
nor while held-out text is read. Every run is kept in speedrun.json, by arm,
split and seed; a run that is there is not repeated.
"""

import argparse
import ast
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import sys
import time

import jax
import numpy as np

import deepseek_jax as ds
from benchmarks.machine import processor
from deepseek_jax import data as datalib
from deepseek_jax.data import corpus
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run import sources
from deepseek_jax.run.chosen import chosen
from deepseek_jax.run.steps import Steps
from deepseek_jax.train import evaluate

LEVELS = (1.8, 1.7, 1.6, 1.5)
_SPLITS = {False: 'choosing', True: 'held out'}


@dataclasses.dataclass(frozen=True)
class Choosing(datalib.Heldout):
  """Reads the held-out documents that a smaller share would train on.

  Attributes:
    share: the smaller one.
  """

  share: float = 0.0

  @functools.cached_property
  def documents(self) -> list:
    """Returns the documents that are read."""
    docs = self.store.heldout_documents()
    texts = self.store.heldout_texts()
    return [
      doc
      for doc, text in zip(docs, texts)
      if not corpus.is_held_out(text, self.share)
    ]


def arm(changes: dict, seed: int, final: bool) -> ds.RunConfig:
  """Returns the demo's run with fields changed, on a split's text."""
  config = ds.changed(ds.recipes.v3_tiny(), {**changes, 'seed': seed})
  config = ds.changed(config, {'data.seed': config.data.seed + seed})
  if not final:
    more = 2 * config.data.heldout_fraction
    config = ds.changed(config, {'data.heldout_fraction': more})
  return chosen(config, pathlib.Path())


def read_by(config: ds.RunConfig, store, final: bool) -> datalib.Heldout:
  """Returns the held-out text that an arm is judged by."""
  args = store, config.data.seq_len, config.evaluate.batch
  if final:
    return datalib.Heldout(*args, stride=config.evaluate.stride)
  share = config.data.heldout_fraction / 2
  return Choosing(*args, stride=config.evaluate.stride, share=share)


def race(config: ds.RunConfig, final: bool, readings: int, say) -> dict:
  """Trains an arm; returns seconds, tokens and bits per byte as it learns.

  Args:
    config: of the run.
    final: which split.
    readings: how often the split is read, evenly over the run.
    say: takes a line for each.
  """
  model = ds.build(config.model)
  steps, writer = Steps(model, config), NoMetrics()
  store = sources.opened(config, say)
  batches = sources.batches(store, config)
  held = read_by(config, store, final)
  state = steps.begin()
  total, length = config.train.tokens, config.data.seq_len
  every = max(1, round(config.steps / readings))
  curve, tokens, number = [], 0, 0
  seconds = compiling = 0.0
  while tokens < total:
    size = config.train.batch.at(tokens)
    rows = batches.next(size, *steps.block(size))
    batch = steps.batch(rows, size)
    start = time.perf_counter()
    steps.compiled(state, batch, writer)
    compiling += time.perf_counter() - start
    start = time.perf_counter()
    state, metrics = steps(state, batch, writer)
    jax.block_until_ready(metrics)
    seconds += time.perf_counter() - start
    number, tokens = number + 1, tokens + size * length
    if number % every == 0 or tokens >= total:
      bits = evaluate.bits_per_byte(model, steps.variables(state), held)
      curve.append([seconds, tokens, bits])
      say(f'step {number}: {seconds:.0f} s, {bits:.4f} bits per byte')
  return {
    'curve': curve,
    'bits_per_byte': curve[-1][2],
    'seconds': seconds,
    'compile_seconds': compiling,
    'documents': len(held.documents),
    'bytes': held.bytes,
    'heldout_sha256': store.heldout_sha256,
  }


def seconds_to(curve: list, level: float) -> float | None:
  """Returns when a curve first reaches a level, read between its points."""
  before = None
  for seconds, _, bits in curve:
    if bits <= level:
      if before is None or before[1] == bits:
        return seconds
      share = (before[1] - level) / (before[1] - bits)
      return before[0] + share * (seconds - before[0])
    before = seconds, bits
  return None


def table(records: dict) -> str:
  """Returns Markdown: a row for each arm and split, means over seeds."""
  head = ' | '.join(f's to {level}' for level in LEVELS)
  lines = [
    f'| arm | split | seeds | {head} | s | bits per byte | changes |',
    '|---' * (len(LEVELS) + 6) + '|',
  ]
  groups: dict[tuple, list[dict]] = {}
  for record in records.values():
    groups.setdefault((record['arm'], record['split']), []).append(record)
  for (name, split), some in groups.items():
    cells = []
    for level in LEVELS:
      times = [seconds_to(one['curve'], level) for one in some]
      known = None not in times
      cells.append(f'{np.mean(times):.0f}' if known else '')
    bits = [one['bits_per_byte'] for one in some]
    spread = f' ± {np.std(bits, ddof=1):.3f}' if len(bits) > 1 else ''
    cells += [
      f'{np.mean([one["seconds"] for one in some]):.0f}',
      f'{np.mean(bits):.3f}{spread}',
      ', '.join(f'{k}={v!r}' for k, v in some[0]['changes'].items()),
    ]
    lines.append(f'| {name} | {split} | {len(some)} | {" | ".join(cells)} |')
  where = {(r['machine'], r['jax'], r['date']) for r in records.values()}
  lines += ['', *(f'- {"; ".join(one)}' for one in sorted(where))]
  return '\n'.join(lines) + '\n'


def value(text: str):
  """Returns a --set as a path and a value."""
  path, equals, literal = text.partition('=')
  if not equals:
    raise argparse.ArgumentTypeError(f'{text!r}: write path=value')
  try:
    return path, ast.literal_eval(literal)
  except (ValueError, SyntaxError):
    return path, literal  # a text


def main(arguments: list[str]) -> int:
  """Runs the seeds of an arm that are missing, and reports all."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--name', help='of the arm')
  parser.add_argument('--set', type=value, action='append', default=[])
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--final', action='store_true')
  parser.add_argument('--readings', type=int, default=20)
  parser.add_argument('--out', default='benchmarks/results')
  parser.add_argument('--report', action='store_true', help='run nothing')
  options = parser.parse_args(arguments)
  if not options.report and not options.name:
    parser.error('--name: name the arm, or give --report')
  if min(options.seeds, options.readings) < 1:
    parser.error('--seeds, --readings: at least 1')
  path = pathlib.Path(options.out) / 'speedrun.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  records = json.loads(path.read_text()) if path.exists() else {}
  changes, split = dict(options.set), _SPLITS[options.final]
  for seed in range(0 if options.report else options.seeds):
    key = f'{options.name}/{split}/{seed}'
    there = records.get(key)
    if there and there['changes'] != json.loads(json.dumps(changes)):
      parser.error(f'--name={options.name}: is an arm of {there["changes"]}')
    if there:
      continue
    try:
      config = arm(changes, seed, options.final)
      made = race(config, options.final, options.readings, print)
    except ds.InputError as error:
      parser.error(str(error))
    records[key] = {
      'arm': options.name,
      'split': split,
      'seed': seed,
      'changes': changes,
      **made,
      'machine': processor(),
      'jax': jax.__version__,
      'date': datetime.date.today().isoformat(),
    }
    scratch = path.with_suffix('.tmp')
    scratch.write_text(json.dumps(records, indent=1) + '\n')
    scratch.replace(path)
  if records:
    (path.parent / 'speedrun.md').write_text(table(records))
    print(table(records))
  worst = max((r['bits_per_byte'] for r in records.values()), default=0.0)
  return int(not math.isfinite(worst))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
