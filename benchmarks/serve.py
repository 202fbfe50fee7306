"""Does the engine serve mixed requests faster than transformers?

64 prompts of 16 to 512 tokens want 16 to 256 new ones each. transformers runs
them in batches of like length, and by its own continuous batching where that
runs on this machine; the best counts.

python -m benchmarks.serve [--rounds=3] [--python=OTHER_PYTHON]
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import contest
from benchmarks.machine import processor

_PEER = 'benchmarks.worker_peer'
SIDES = (
  ('ours', 'benchmarks.worker_ours', 'serve', 24),
  ('transformers, batches of 8', _PEER, 'serve', 8),
  ('transformers, batches of 16', _PEER, 'serve', 16),
  ('transformers, batches of 32', _PEER, 'serve', 32),
  ('transformers, generate_batch', _PEER, 'serve_paged', 16),
)


def main() -> None:
  """Runs all sides in turns and writes results/serve.json."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--python', default=sys.executable, help='interpreter of our side'
  )
  args = parser.parse_args()
  sides, refused = [], []
  for name, module, task, batch in SIDES:
    python = args.python if name == 'ours' else sys.executable
    try:
      sides.append(contest.Contender(name, python, module, task, batch))
    except SystemExit as error:
      refused.append(name)
      print(f'{name}: does not run here ({error})', file=sys.stderr)
  for i in range(args.rounds):
    for side in sides if i % 2 == 0 else sides[::-1]:
      side.turn()
  tokens, rows = sum(new for _, new in contest.requests()), []
  for side in sides:
    side.close()
    rows.append(
      {
        'side': side.name,
        'tokens_per_second': tokens / statistics.median(side.seconds),
        'seconds': side.seconds,
        'peak_bytes': side.peak,
        'first_call_seconds': side.ready['first'],
        'versions': side.ready['versions'],
        **side.more,
      }
    )
  best = max(r['tokens_per_second'] for r in rows[1:])
  ratio = rows[0]['tokens_per_second'] / best
  table = Table('side', 'new tokens/s', 'peak GiB', 'first token p50, p99')
  for row in rows:
    first = [f'{row[k]:.2f} s' for k in ('first_p50', 'first_p99') if k in row]
    table.add_row(
      row['side'],
      f'{row["tokens_per_second"]:.0f}',
      f'{row["peak_bytes"] / 2**30:.2f}',
      ', '.join(first),
    )
  Console().print(table)
  print(f'ratio to the best of transformers: {ratio:.2f}')
  result = {
    'date': datetime.date.today().isoformat(),
    'machine': processor(),
    'requests': contest.REQUESTS,
    'ratio': ratio,
    'does_not_run': refused,
    'rows': rows,
  }
  path = Path(__file__).parent / 'results' / 'serve.json'
  path.write_text(json.dumps(result, indent=1) + '\n')
  print(path)


if __name__ == '__main__':
  main()
