"""Shows runs side by side: tables, a page and numbers (see compare.py)."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepseek_jax.errors import InputError, naming
from deepseek_jax.record import comparison
from deepseek_jax.record.report import compared
from deepseek_jax.run import folder


def tables(arms: Sequence[comparison.Arm], metric: str) -> list[Table]:
  """Returns the arms and their differences as tables for a terminal."""
  rows = comparison.table(arms, metric)
  first = Table(title='arms: means over seeds, ± a 95 % interval')
  for name in rows[0]:
    first.add_column(name, justify='left' if name == 'arm' else 'right')
  for row in rows:
    first.add_row(*row.values())
  out = [first]
  found = comparison.differences(arms, metric)
  if found:
    second = Table(title=f'{metric} less that of {arms[0].name}, by seed')
    for name in ('arm', 'difference', 'seeds', 'verdict'):
      second.add_column(name)
    for d in found:
      second.add_row(d.name, str(d.interval), str(d.interval.count), d.verdict)
    out.append(second)
  return out


def known_metric(entries: Sequence[comparison.RunFolder], metric: str) -> None:
  """Raises InputError where no run has a metric."""
  if any(comparison.value(entry, metric) is not None for entry in entries):
    return
  known = sorted({name for entry in entries for name in entry.curves})
  raise InputError(
    f'--metric={metric}: no run has it; they have {", ".join(known) or "none"}'
  )


def compare(
  given: Sequence[str],
  metric: str,
  out: Path,
  title: str,
  json_path: str | os.PathLike | None,
) -> None:
  """Prints the tables of runs and writes their page, and their numbers."""
  found = comparison.folders(given)
  entries = [comparison.read(path, folder.filled) for path in found]
  known_metric(entries, metric)
  arms = comparison.arms(entries)
  # A log has no width: rows stay whole.
  console = Console(width=None if sys.stdout.isatty() else 180)
  for line in comparison.cautions(arms):
    console.print(line, style='yellow', markup=False, highlight=False)
  for table in tables(arms, metric):
    console.print(table)
  if json_path:
    found = comparison.differences(arms, metric)
    numbers = {
      'metric': metric,
      'arms': {
        arm.name: {
          str(run.path): comparison.value(run, metric) for run in arm.runs
        }
        for arm in arms
      },
      'differences': {
        d.name: {**d.interval._asdict(), 'verdict': d.verdict} for d in found
      },
    }
    with naming(json_path):
      Path(json_path).write_text(json.dumps(numbers, indent=2) + '\n')
  path = compared.write(out, arms, metric, title)
  console.print(f'comparison: {path.absolute()}', soft_wrap=True)
