"""Times contenders against each other: one process each, taking turns.

A contender is `python -m benchmarks.<worker> --task=...`: it says when it is
ready, then runs two units of work for every line that it reads, the first to
have its memory and caches back after the other's turn, and times the second.
Of serving, which takes most of a minute, one unit is enough.
Turns alternate, so a slow minute of the machine hits all alike; medians are
reported.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import processor

# A research-size V3 in the words of its config.json: 33.7M parameters.
SHAPES = {
  'vocab_size': 8192,
  'hidden_size': 384,
  'num_hidden_layers': 6,
  'first_k_dense_replace': 1,
  'num_attention_heads': 6,
  'num_key_value_heads': 6,
  'q_lora_rank': 192,
  'kv_lora_rank': 128,
  'qk_nope_head_dim': 32,
  'qk_rope_head_dim': 16,
  'v_head_dim': 32,
  'n_routed_experts': 32,
  'num_experts_per_tok': 4,
  'n_shared_experts': 1,
  'moe_intermediate_size': 128,
  'intermediate_size': 1024,
  'n_group': 4,
  'topk_group': 2,
  'routed_scaling_factor': 2.5,
  'norm_topk_prob': True,
  'rms_norm_eps': 1e-6,
  'max_position_embeddings': 2048,
  'initializer_range': 0.02,
}
BATCH, LENGTH = 8, 512  # of a training step and of prefill
PROMPT, NEW = 128, 128  # of decoding
REQUESTS = 64  # of serving, of mixed lengths
TASKS = ('train', 'prefill', 'decode', 'serve', 'serve_paged')


def serve(make) -> None:
  """A worker's main: `make(task, batch)` returns a function to be timed."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--task', choices=TASKS)
  parser.add_argument('--batch', type=int, default=BATCH)
  args = parser.parse_args()
  start = time.perf_counter()
  run, versions = make(args.task, args.batch)
  run()
  first = time.perf_counter() - start
  again = lambda: None if args.task.startswith('serve') else run()
  again()
  print('@' + json.dumps({'first': first, 'versions': versions}), flush=True)
  for _ in sys.stdin:
    again()
    start = time.perf_counter()
    more = run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    more = more if isinstance(more, dict) else None
    said = {'s': seconds, 'peak': peak, 'more': more}
    print('@' + json.dumps(said), flush=True)


def requests() -> list[tuple[list[int], int]]:
  """Returns prompts of 16 to 512 tokens, and 16 to 256 new ones for each."""
  rng = np.random.default_rng(0)
  sizes = rng.integers((16, 16), (513, 257), (REQUESTS, 2))
  draw = lambda n: rng.integers(0, SHAPES['vocab_size'], n).tolist()
  return [(draw(prompt), int(new)) for prompt, new in sizes]


class Contender:
  """A worker process."""

  def __init__(self, name, python, module, task, batch):
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu'}
    # For both sides alike: glibc keeps freed pages.
    env |= {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '-1'}
    self.name = name
    self._process = subprocess.Popen(
      [python, '-m', module, f'--task={task}', f'--batch={batch}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
    )
    self.ready = self._read()
    self.seconds, self.peak, self.more = [], 0, {}

  def _read(self):
    for line in self._process.stdout:
      if line.startswith('@'):
        return json.loads(line[1:])
    raise SystemExit(f'{self.name} died with {self._process.wait()}')

  def turn(self):
    self._process.stdin.write('go\n')
    self._process.stdin.flush()
    answer = self._read()
    self.seconds.append(answer['s'])
    self.peak = answer['peak']
    self.more = answer.get('more') or {}

  def close(self):
    self._process.stdin.close()
    self._process.wait(60)


def contest(task: str, batch: int, tokens: int, rounds: int, python: str):
  """Runs one task -> a row: tokens/s of both sides and what else was seen."""
  sides = [
    Contender('ours', python, 'benchmarks.worker_ours', task, batch),
    Contender(
      'transformers', sys.executable, 'benchmarks.worker_peer', task, batch
    ),
  ]
  for i in range(rounds):
    for side in sides if i % 2 == 0 else sides[::-1]:
      side.turn()
  for side in sides:
    side.close()
  row = {'task': task, 'batch': batch}
  for side in sides:
    row[side.name] = {
      'tokens_per_second': tokens / statistics.median(side.seconds),
      'peak_bytes': side.peak,
      'first_call_seconds': side.ready['first'],
      'seconds': side.seconds,
      'versions': side.ready['versions'],
    }
  ours, peer = row['ours'], row['transformers']
  row['ratio'] = ours['tokens_per_second'] / peer['tokens_per_second']
  row['memory_ratio'] = ours['peak_bytes'] / peer['peak_bytes']
  return row


def main(name: str, tasks) -> None:
  """Runs `tasks` (task, batch, tokens) and writes results/<name>.json."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument(
    '--python', default=sys.executable, help='interpreter of our side'
  )
  args = parser.parse_args()
  rows = [contest(*task, args.rounds, args.python) for task in tasks]
  table = Table(
    'task', 'batch', 'ours tok/s', 'transformers', 'ratio', 'memory'
  )
  for row in rows:
    table.add_row(
      row['task'],
      str(row['batch']),
      f'{row["ours"]["tokens_per_second"]:.0f}',
      f'{row["transformers"]["tokens_per_second"]:.0f}',
      f'{row["ratio"]:.2f}',
      f'{row["memory_ratio"]:.2f}',
    )
  Console().print(table)
  path = Path(__file__).parent / 'results' / f'{name}.json'
  path.parent.mkdir(exist_ok=True)
  keep(path, rows)
  print(path)


def keep(path: Path, rows: list[dict]) -> None:
  """Puts a run's rows into a file, beside those of other machines.

  The run of the same processor and the same JAX is replaced; others keep their
  date and commit.

  Args:
    path: of a JSON file with `runs`, of whose entries each has `date`,
      `commit`, `machine`, `jax` and `rows`; made where there is none.
    rows: of `contest`, of one version of JAX.
  """
  run = {
    'date': datetime.date.today().isoformat(),
    'commit': _commit(),
    'machine': processor(),
    'jax': rows[0]['ours']['versions']['jax'],
    'rows': rows,
  }
  runs = json.loads(path.read_text())['runs'] if path.exists() else []
  same = lambda other: all(other[k] == run[k] for k in ('machine', 'jax'))
  runs = [other for other in runs if not same(other)] + [run]
  runs.sort(key=lambda run: (run['machine'], run['jax']))
  path.write_text(json.dumps({'runs': runs}, indent=1) + '\n')


def _commit() -> str:
  """Returns the commit that is measured, with '+' where code differs."""

  def git(*words: str) -> subprocess.CompletedProcess:
    folder = Path(__file__).parents[1]
    return subprocess.run(
      ['git', *words], cwd=folder, capture_output=True, text=True
    )

  head = git('rev-parse', '--short', 'HEAD').stdout.strip()
  code = git('status', '--porcelain', '--', '.', ':!benchmarks/results').stdout
  return f'{head}+' if head and code else head or 'unknown'
