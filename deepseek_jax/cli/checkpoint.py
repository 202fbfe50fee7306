"""Lists, verifies and prunes the checkpoints of a run.

    python -m experiments.checkpoint ls runs/mine
    python -m experiments.checkpoint verify runs/mine
    python -m experiments.checkpoint prune runs/mine --keep=1

`verify` reads every byte and exits with 1 if a step is damaged. `prune` removes
damaged steps, unfinished saves and all but the newest whole steps; it leaves
everything as it is when no step is whole, and when a run is under way.
"""

import shutil
import sys
import time
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from deepseek_jax.cli import common
from deepseek_jax.console import short
from deepseek_jax.errors import InputError
from deepseek_jax.run import integrity, lock

_KEEP = flags.DEFINE_integer('keep', 1, 'Whole steps that prune leaves.', 1)
_VERBS = ('ls', 'verify', 'prune')


def folder_of(name: str) -> Path:
  """Returns the folder of checkpoints that a path or its run has.

  Raises:
    InputError: there is no checkpoint.
  """
  given = Path(name)
  folder = given / 'checkpoints' if (given / 'checkpoints').is_dir() else given
  if not folder.is_dir() or not steps(folder):
    raise InputError(f'{given}: holds no checkpoint; name the folder of a run')
  return folder


def steps(folder: Path) -> list[Path]:
  """Returns the folders of committed steps, oldest first."""
  found = (p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
  return sorted(found, key=lambda path: int(path.name))


def ls(folder: Path) -> int:
  """Prints a table of the steps; returns the exit status."""
  table = Table(title=str(folder))
  for name in ('step', 'bytes', 'written', 'manifest'):
    table.add_column(name, justify='right')
  for path in steps(folder):
    when = time.strftime('%Y-%m-%d %H:%M', time.localtime(path.stat().st_mtime))
    there = 'yes' if (path / integrity.MANIFEST).exists() else 'missing'
    table.add_row(path.name, f'{integrity.size(path):,}', when, there)
  Console().print(table)
  return 0


def verify(folder: Path) -> int:
  """Reads every step; returns 1 as exit status if one is damaged."""
  damaged = 0
  for path in steps(folder):
    start = time.perf_counter()
    reason = integrity.problem(path)
    seconds = short(time.perf_counter() - start)
    print(f'{path.name}: {reason or "whole"} ({seconds} s)')
    damaged += reason is not None
  return int(damaged > 0)


def prune(folder: Path, keep: int) -> int:
  """Removes all but the newest `keep` whole steps; returns the exit status."""
  if (folder.parent / 'config.json').exists():
    lock.take(folder.parent)
  every = steps(folder)
  whole = [p for p in every if integrity.problem(p) is None]
  if not whole:
    raise InputError(f'{folder}: no step is whole; nothing was removed')
  unfinished = folder.glob('*.orbax-checkpoint-tmp*')
  for path in [*(p for p in every if p not in whole[-keep:]), *unfinished]:
    shutil.rmtree(path)
    print(f'removed {path.name}')
  return 0


def main(argv: list[str]) -> None:
  """Runs the verb that the arguments name."""
  if len(argv) != 3 or argv[1] not in _VERBS:
    raise InputError(
      f'arguments {argv[1:]}: give one of {list(_VERBS)} and a folder'
    )
  folder = folder_of(argv[2])
  if argv[1] == 'prune':
    sys.exit(prune(folder, _KEEP.value))
  sys.exit({'ls': ls, 'verify': verify}[argv[1]](folder))


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, arguments=True)
