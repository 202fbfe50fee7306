"""Runs stages one after the other, each once, whoever ends the process.

A stage that has ended leaves `stages/NAME.json`, written whole: what it found,
and its seconds. It is not run again.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax import config as configs
from deepseek_jax import files
from deepseek_jax.config_changes import with_defaults
from deepseek_jax.errors import InputError
from deepseek_jax.run import lock

RECIPE = 'recipe.json'
_STAGES = 'stages'
_OWN = (lock.FILE, 'recipe.tmp')  # of a chain that was killed at its start


@dataclasses.dataclass(frozen=True)
class ChainStage:
  """Describes a stage.

  Attributes:
    name: of its record, and of its folder where it is a run.
    what: it does, for people.
    run: does it; what it returns is recorded, as JSON holds it.
    kind: 'run' has the folder of a run, 'measure' scores one, 'file' writes
      files.
  """

  name: str
  what: str
  run: Callable[[], dict[str, Any]]
  kind: str = 'file'


def claim(folder: Path, recipe: Any) -> None:
  """Takes a folder for a chain: writes its recipe, or finds it to be this one.

  Where no stage has ended nothing was made by another recipe: this one takes
  its place, so a mistake that the first stage found is put right.

  Raises:
    InputError: the folder is another chain's, or one is under way there.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path, made = folder / RECIPE, folder / _STAGES
  begun = made.exists() and any(made.iterdir())
  mine = json.loads(json.dumps(configs.to_dict(recipe)))
  if path.exists():
    theirs = with_defaults(files.load_json(str(path)), recipe)
    if theirs != mine and begun:
      names = [n for n in {**theirs, **mine} if theirs.get(n) != mine.get(n)]
      raise InputError(
        f'{folder}: was begun with another recipe ({names[0]} ='
        f' {str(theirs.get(names[0], "absent"))[:60]} there,'
        f' {str(mine.get(names[0], "absent"))[:60]} here); choose another'
        ' --workdir or the same recipe'
      )
  elif any(p.name not in _OWN for p in folder.iterdir()):
    raise InputError(
      f'{folder}: is not empty and holds no chain of stages; choose another'
      ' --workdir'
    )
  lock.take(folder)
  if not path.exists() or not begun:
    with files.whole(path) as scratch:
      scratch.write_text(json.dumps(mine, indent=2) + '\n')


def run(
  stages: Sequence[ChainStage],
  folder: Path,
  *,
  until: str | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Runs the stages that have not ended, in order.

  Args:
    stages: of the chain.
    folder: of the chain.
    until: name of the last stage to run; None: all.
    say: takes a line on each stage.

  Raises:
    InputError: no stage has the name `until`.
  """
  names = [stage.name for stage in stages]
  if until is not None and until not in names:
    raise InputError(f'until = {until!r}: must be one of {names}')
  last = len(stages) if until is None else names.index(until) + 1
  for number, stage in enumerate(stages[:last], start=1):
    step(stage, folder, number, f'{number}/{len(stages)} {stage.name}', say=say)


def step(
  stage: ChainStage,
  folder: Path,
  number: int,
  where: str,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Runs a stage unless it has ended; returns what it left.

  Args:
    stage: of the chain.
    folder: of the chain.
    number: its place among the stages.
    where: begins the lines about it.
    say: takes them.
  """
  record = found(folder, stage.name)
  if record is not None:
    say(f'{where}: has ended')
    return record
  say(f'{where}: {stage.what}')
  before, begun = _earlier(folder / stage.name), time.perf_counter()
  made = stage.run()
  seconds = before + time.perf_counter() - begun
  told = {'name': stage.name, 'what': stage.what, 'kind': stage.kind}
  told |= {'number': number, 'seconds': seconds}
  write(folder / _STAGES / f'{stage.name}.json', told | made)
  return told | made


def write(path: Path, values: Any) -> None:
  """Writes JSON, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as scratch:
    scratch.write_text(json.dumps(values, indent=1, allow_nan=False) + '\n')


def write_lines(path: Path, rows: Sequence[Any]) -> None:
  """Writes lines of JSON, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as scratch:
    scratch.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))


def found(folder: Path, name: str) -> dict[str, Any] | None:
  """Returns what a stage left; None if it has not ended."""
  path = folder / _STAGES / f'{name}.json'
  return files.load_json(str(path)) if path.exists() else None


def _earlier(workdir: Path) -> float:
  """Returns the seconds of a run's earlier launches, by its timeline."""
  path = workdir / 'timeline.jsonl'
  lines = path.read_text('utf-8').splitlines() if path.exists() else []
  return math.fsum(json.loads(line)['seconds'] for line in lines)
