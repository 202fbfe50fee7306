"""How does the engine's speed grow with rows and context, and do drafts pay?

    python -m benchmarks.engine [--workdir=runs/demo] [--rounds=3]

Without --workdir: new tokens per second of the model of `benchmarks.serve`, for
1 to 32 answers at once (beside `ds.generate`, one loop for a fixed batch), and
for contexts of 512 to 8,192 tokens. With it: what multi-token prediction gives
the model of a run, on prompts of its held-out text: the share of drafts that
stay, tokens a call, and tokens per second over plain decoding. Medians; it
writes engine.json and engine.png, or drafts.json.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import deepseek_jax as ds
from benchmarks import worker_ours
from benchmarks.machine import processor
from deepseek_jax import data
from deepseek_jax.infer import sampling

ROWS = (1, 2, 4, 8, 16, 32)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
DRAFT_ROWS = (1, 4, 16)
NEW = 128  # tokens of an answer
LABELS = {
  'rows': 'the engine',
  'ds.generate': 'ds.generate',
  'context': '1 answer',
  'context, 8 rows': '8 answers',
}
GREEDY = ds.Sampling(temperature=0)


@dataclasses.dataclass
class Timed:
  """An engine, its requests, and how long they took."""

  engine: ds.Engine
  asked: list
  seconds: list = dataclasses.field(default_factory=list)
  answers: list = dataclasses.field(default_factory=list)

  def turn(self) -> None:
    """Answers all of them; only decoding is timed."""
    engine = self.engine
    numbers = [engine.submit(request) for request in self.asked]
    events = {number: [] for number in numbers}
    # The first token of the last answer ends the prefill of all.
    while not all(events.values()):
      for event in engine.step():
        events[event.request].append(event)
    before = sum(len(e.tokens) for some in events.values() for e in some)
    begun = time.perf_counter()
    while engine.busy():
      for event in engine.step():
        events[event.request].append(event)
    spent = time.perf_counter() - begun
    after = sum(len(e.tokens) for some in events.values() for e in some)
    self.seconds.append(spent / (after - before))
    self.answers = [some[-1].usage for some in events.values()]

  @property
  def rate(self) -> float:
    """Tokens per second, without the first round, which warms up."""
    return 1 / statistics.median(self.seconds[1:])


def timed(model, variables, prompts, new=NEW, **change) -> Timed:
  """An engine for these prompts alone, warm."""
  rows, longest = len(prompts), max(map(len, prompts)) + new
  cfg = ds.EngineConfig(
    slots=rows,
    context=longest,
    budget=512,
    rows=(rows,),
    contexts=(longest,),
    reuse=False,
    **{'steps': 16, **change},
  )
  engine = ds.Engine(model, variables, cfg)
  engine.warm_up()
  return Timed(engine, [ds.Request(tuple(p), new, GREEDY) for p in prompts])


def growth(rounds: int) -> dict:
  """Tokens per second against rows and against context."""
  model = ds.build(worker_ours.config())
  variables = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, model.config.vocab_size, n).tolist()
  sizes = [('rows', rows, rows, 128) for rows in ROWS]
  sizes += [('context', n, 1, n - NEW) for n in CONTEXTS]
  sizes += [('context, 8 rows', n, 8, n - NEW) for n in CONTEXTS]
  records = []
  for what, size, rows, prompt in sizes:
    one = timed(model, variables, [draw(prompt) for _ in range(rows)])
    for _ in range(rounds + 1):
      one.turn()
    records.append(
      {
        'axis': what,
        'size': size,
        'tokens_per_second': one.rate,
        'cache_bytes': one.engine.stats['cache_bytes'],
        'seconds_per_token': one.seconds[1:],
      }
    )
    print(f'{what} {size}: {one.rate:.0f} tokens/s', flush=True)
  for rows in (1, 8):
    tokens = np.array([draw(128) for _ in range(rows)])
    records.append(
      {
        'axis': 'ds.generate',
        'size': rows,
        'tokens_per_second': _generated(model, variables, tokens, rounds),
      }
    )
    print(f'ds.generate, {rows}: {records[-1]["tokens_per_second"]:.0f}')
  return {'records': records}


def _generated(model, variables, tokens, rounds: int) -> float:
  """Tokens per second of `ds.generate`, its prefill taken off."""
  variables = sampling.prepare(model, variables)
  how = sampling.SampleConfig(temperature=0)
  spent = {1: [], 1 + NEW: []}
  for _ in range(rounds + 1):
    for new, seconds in spent.items():
      begun = time.perf_counter()
      sampling.sample(model, variables, tokens, how, max_new_tokens=new)
      seconds.append(time.perf_counter() - begun)
  first, all_ = (statistics.median(s[1:]) for s in spent.values())
  return len(tokens) * NEW / (all_ - first)


def plot(records: list[dict], path: pathlib.Path) -> None:
  """Two panels: rows, and context."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
  for axis in dict.fromkeys(r['axis'] for r in records):
    some = [r for r in records if r['axis'] == axis]
    panels[int(axis.startswith('context'))].plot(
      [r['size'] for r in some],
      [r['tokens_per_second'] for r in some],
      'o-',
      label=LABELS[axis],
    )
  for panel, label in zip(panels, ('answers at once', 'context, tokens')):
    panel.set_xscale('log', base=2)
    panel.xaxis.set_major_formatter('{x:,.0f}')
    panel.set_ylim(bottom=0)
    panel.set_xlabel(label)
    panel.set_ylabel('new tokens/s')
    panel.grid(alpha=0.3)
    panel.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=150)


def drafts(workdir: str, rounds: int) -> dict:
  """Measures what drafts give on a run's held-out text."""
  run = ds.load(workdir)
  store = data.build(run.config.data)
  ids = [
    store.heldout[doc.offset : doc.offset + 96].tolist()
    for doc in store.heldout_documents()
    if doc.tokens > 96
  ]
  records = []
  for rows in DRAFT_ROWS:
    sides = [
      timed(run.model, run.variables, ids[:rows], drafts=k) for k in (0, 1, 2)
    ]
    for turn in range(rounds + 1):
      for side in sides if turn % 2 == 0 else sides[::-1]:
        side.turn()
    for k, side in enumerate(sides):
      kept = sum(u.accepted_drafts for u in side.answers)
      made = kept + sum(u.rejected_drafts for u in side.answers)
      stats = side.engine.stats
      records.append(
        {
          'rows': rows,
          'drafts': k,
          'tokens_per_second': side.rate,
          'ratio': side.rate / sides[0].rate,
          'acceptance': kept / made if made else None,
          'tokens_per_call': stats['tokens'] / stats['decode_calls'] / rows,
          'seconds_per_token': side.seconds[1:],
        }
      )
  table = Table('rows', 'drafts', 'tokens/s', 'ratio', 'stay', 'tokens/call')
  for r in records:
    stay = '' if r['acceptance'] is None else f'{r["acceptance"]:.2f}'
    table.add_row(
      str(r['rows']),
      str(r['drafts']),
      f'{r["tokens_per_second"]:.0f}',
      f'{r["ratio"]:.2f}',
      stay,
      f'{r["tokens_per_call"]:.2f}',
    )
  Console().print(table)
  return {'records': records}


def main() -> None:
  """Measures, and writes results."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', default='')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  out = pathlib.Path(__file__).parent / 'results'
  if args.workdir:
    name, made = 'drafts', drafts(args.workdir, args.rounds)
  else:
    name, made = 'engine', growth(args.rounds)
  about = {
    'date': datetime.date.today().isoformat(),
    'machine': processor(),
    'jax': jax.__version__,
  }
  text = json.dumps({**about, **made}, indent=1) + '\n'
  (out / f'{name}.json').write_text(text)
  if not args.workdir:
    plot(made['records'], out / 'engine.png')


if __name__ == '__main__':
  main()
