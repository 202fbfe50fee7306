"""Climbs from Llama to V4, one idea at a time, at equal training FLOPs.

    deepseek-jax ladder --size=half_hour --folder=runs/ladder
    deepseek-jax ladder --size=half_hour --folder=runs/ladder --dry
    deepseek-jax ladder --size=half_hour --folder=runs/ladder --rungs=gqa,mla
    deepseek-jax ladder --size=half_hour --folder=mine --arms=my_ladder/

Each rung is the one below with one change. Its runs are folders in --folder,
which `compare` reads, too: what has ended is not run again, what was cut short
goes on, and several processes may share the rungs (--rungs). At the smallest
budget the learning rates are tried, the best one is run through all budgets and
with further seeds. At the end FOLDER/ladder.json, .md and .png say
how much compute each rung needs for the last loss of the dense rung `gqa`, with
an interval, and what the planner says each idea saves. --arms takes a folder of
experiment files, as experiments/ladder/ has, in the order of their names.
"""

import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from deepseek_jax import config as configs
from deepseek_jax import files
from deepseek_jax.cli import common, experiment_file, finish
from deepseek_jax.config_changes import with_defaults
from deepseek_jax.errors import InputError, RunAborted
from deepseek_jax.ladder import costs, figure, measured, rungs, table, trials
from deepseek_jax.ladder.sizes import SIZES
from deepseek_jax.record import results
from deepseek_jax.run import fit as loop
from deepseek_jax.run.folder import as_json
from deepseek_jax.run.steps import shared_programs

_SIZE = flags.DEFINE_enum(
  'size', 'half_hour', tuple(SIZES), 'How large the models and budgets are.'
)
_FOLDER = flags.DEFINE_string('folder', None, 'Folder of the ladder.')
_RUNGS = flags.DEFINE_list('rungs', [], 'Run these alone, in this process.')
_ARMS = flags.DEFINE_string(
  'arms', None, 'A folder of experiment files in place of the built-in rungs.'
)
_FIRST = flags.DEFINE_string(
  'first', 'gqa', 'The rung whose last loss the others are to reach.'
)
_OUT = flags.DEFINE_string(
  'out', None, 'Where results go, without an ending; FOLDER/ladder if left out.'
)
_REPORT = flags.DEFINE_bool(
  'report', False, 'Run nothing; write results from what has been measured.'
)
_DRY = flags.DEFINE_bool('dry', False, 'Say what would run, and end.')
FILE = 'plan.json'
_ENVIRONMENT = ('JAX_DEFAULT_PRNG_IMPL', 'XLA_FLAGS')


def own_arms(folder: Path) -> dict[str, loop.RunConfig]:
  """Returns the runs of a folder of experiment files, in order of their names.

  Digits and '_' before a name are left out: 05_mla.py is the rung mla.

  Raises:
    InputError: there is none, or a file gives no run.
  """
  if not folder.is_dir():
    raise InputError(f'--arms={folder}: is no folder of experiment files')
  out: dict[str, loop.RunConfig] = {}
  for path in sorted(folder.glob('[!_]*.py')):
    name = path.stem.lstrip('0123456789_')
    if not name or name in out:
      raise InputError(f'--arms: {path}: its name names no other rung; rename')
    try:
      run = experiment_file.load(str(path)).get_config(_SIZE.value)
    except InputError:
      raise
    except Exception as error:  # the user's file may raise anything
      raise InputError(
        f'--arms: {path}: {type(error).__name__}: {error}'
      ) from error
    if not isinstance(run, loop.RunConfig):
      raise InputError(
        f'--arms: {path}: get_config(size) returns {type(run).__name__}; return'
        ' a RunConfig, as ds.ladder.config has them'
      )
    out[name] = run
  if not out:
    raise InputError(f'--arms={folder}: holds no experiment file')
  return out


def chosen(arms: Mapping[str, loop.RunConfig]) -> dict[str, loop.RunConfig]:
  """Returns the arms that --rungs names, all of them without it.

  Raises:
    InputError: --rungs or --first names another.
  """
  for flag, given in (('rungs', _RUNGS.value), ('first', [_FIRST.value])):
    for name in given:
      if name not in arms:
        raise InputError(f'--{flag}={name}: must be one of {", ".join(arms)}')
  wanted = _RUNGS.value or arms
  return {name: run for name, run in arms.items() if name in wanted}


def claim(folder: Path, arms: Mapping[str, loop.RunConfig]) -> None:
  """Takes a folder for a ladder, or finds it to be this one's.

  Raises:
    InputError: it is another ladder's.
  """
  size = SIZES[_SIZE.value]
  plain = {
    'size': configs.to_dict(size),
    'arms': {name: as_json(run) for name, run in arms.items()},
  }
  plain = json.loads(json.dumps(plain))
  path = folder / FILE
  if path.exists():
    there = files.load_json(str(path))
    if with_defaults(there, {'size': size, 'arms': arms}) != plain:
      raise InputError(
        f'--folder={folder}: holds another ladder; choose another, or the same'
        ' --size and --arms'
      )
    return
  folder.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as scratch:
    scratch.write_text(json.dumps(plain, indent=2) + '\n')


def run_one(made: trials.Trial, workdir: Path) -> str:
  """Trains a run as far as it is to go; returns a line on it."""
  try:
    run = loop.fit(made.config, workdir, console=False, until=made.until)
  except RunAborted as error:
    measured.mark(workdir, str(error))
    return f'gave up ({error})'
  bits = measured.points_of(workdir.parent, made)[-1].loss
  held = run.store.heldout_documents()
  reached = {
    'heldout': {
      'bits_per_byte': bits,
      'documents': len(held),
      'tokens': sum(doc.tokens for doc in held),
      'bytes': sum(doc.bytes for doc in held),
    },
    **finish.spent_by(run, workdir),
  }
  results.write(workdir, reached)
  return f'{bits:.4f} bits per byte, {reached["seconds"]:.0f} s'


def run_all(made: Sequence[trials.Trial], folder: Path, what: str) -> None:
  """Runs what has not ended, one after the other.

  Raises:
    Preempted: a run was; the same command goes on with it.
  """
  size = SIZES[_SIZE.value]
  over = measured.ended(folder, made) | measured.gave_up(folder, made)
  left = [trial for trial in made if trial.name not in over]
  total = sum(trial.flops for trial in left)
  rung_of = lambda trial: trial.rung
  number = 0
  for _, several in itertools.groupby(left, rung_of):
    with shared_programs():  # seeds are one program
      for trial in several:
        line = run_one(trial, folder / trial.name)
        number, total = number + 1, total - trial.flops
        rest = trials.hours(total, len(left) - number, size)
        print(
          f'{what} {number}/{len(left)} {trial.name}: {line}; {rest:.2f} hours'
          ' left if the machine is quiet',
          flush=True,
        )
    jax.clear_caches()  # no other rung has these programs


def climb(
  folder: Path,
  arms: Mapping[str, loop.RunConfig],
  mine: Mapping[str, loop.RunConfig],
) -> None:
  """Runs what is left of some rungs.

  Args:
    folder: of the ladder.
    arms: rung -> its run, all of the ladder.
    mine: those that this process runs.

  Raises:
    InputError: no learning rate trains a rung.
    Preempted: a run was; the same command goes on with it.
  """
  size = SIZES[_SIZE.value]
  tried = trials.rate_trials(arms, size, list(mine))
  run_all(tried, folder, 'rates')
  rates = trials.best_rates(folder, arms, size, measured.ended(folder, tried))
  without = [rung for rung in mine if rung not in rates]
  if without:
    raise InputError(
      f'{", ".join(without)}: no learning rate of'
      f' {", ".join(f"{r:g}" for r in size.rates)} trains; give lower ones'
    )
  # The largest budget last: a ladder that is cut short has curves.
  for budgets in range(2, len(size.budgets) + 1):
    made = trials.further_trials(mine, size, rates, budgets)
    run_all(made, folder, f'budget {budgets}')


def report(
  folder: Path,
  arms: Mapping[str, loop.RunConfig],
  made: tuple[Sequence[trials.Trial], Sequence[trials.Trial]],
  rates: Mapping[str, float],
) -> None:
  """Writes results as JSON, Markdown and a picture."""
  size = SIZES[_SIZE.value]
  found: dict[str, Any] = measured.conclusion(
    folder, arms, made, rates, size, _FIRST.value
  )
  given = [f'--size={_SIZE.value}', f'--folder={folder}']
  given += [f'--arms={_ARMS.value}'] if _ARMS.value else []
  # What else decides the numbers, in their last digits or all of them.
  env = [f'{n}={os.environ[n]}' for n in _ENVIRONMENT if os.environ.get(n)]
  found['command'] = shlex.join([*env, 'deepseek-jax', 'ladder', *given])
  found['name'] = _SIZE.value
  if not _ARMS.value:
    published = costs.published_costs()
    found['published'] = {n: c._asdict() for n, c in published.items()}
  out = Path(_OUT.value) if _OUT.value else folder / 'ladder'
  for ending, text in (
    ('.json', json.dumps(found, indent=2) + '\n'),
    ('.md', table.page(found, out.name)),
  ):
    with files.whole(out.with_suffix(ending)) as scratch:
      scratch.write_text(text, encoding='utf-8')
  figure.draw(found, out.with_suffix('.png'))
  print(table.reach_table(found))
  print(f'results: {out.with_suffix(".md").absolute()}, .json and .png')


def main(argv: list[str]) -> None:
  """Climbs the ladder of a folder, or the rungs that are named."""
  del argv
  if not _FOLDER.value:
    raise InputError('give --folder=FOLDER, where the runs go')
  folder, size = Path(_FOLDER.value), SIZES[_SIZE.value]
  arms = rungs.climbed(size)
  if _ARMS.value:
    arms = own_arms(Path(_ARMS.value))
  mine = chosen(arms)
  count, flops = trials.planned(arms, size, list(mine))
  print(
    f'{_SIZE.value}: {len(mine)} rungs, {count} runs, {flops:.2g} FLOPs: about'
    f' {trials.hours(flops, count, size):.2g} hours on two quiet CPU cores'
    f' ({size.speed:.0e} FLOPs a second, {size.overhead:g} s a run beside)',
    flush=True,
  )
  tried = trials.rate_trials(arms, size, list(mine))
  if _DRY.value:
    likely = dict.fromkeys(mine, size.rates[0])
    every = (*tried, *trials.further_trials(mine, size, likely))
    print('\n'.join(dict.fromkeys(trial.name for trial in every)))
    return
  claim(folder, arms)
  if not _REPORT.value:
    climb(folder, arms, mine)
  tried = trials.rate_trials(arms, size)
  rates = trials.best_rates(folder, arms, size, measured.ended(folder, tried))
  known = {rung: run for rung, run in arms.items() if rung in rates}
  runs = trials.further_trials(known, size, rates)
  over = measured.ended(folder, runs) | measured.gave_up(folder, runs)
  left = [rung for rung in arms if rung not in known]
  left += [t.name for t in runs if t.name not in over]
  if left and not _REPORT.value:
    print(
      f'not complete yet: {", ".join(left)}; without --rungs, or with --report,'
      ' the command writes results'
    )
    return
  report(folder, arms, (tried, runs), rates)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)


if __name__ == '__main__':
  run()
