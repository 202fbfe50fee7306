"""Runs every arm of a sweep with every seed, in turn or as a SLURM array.

    deepseek-jax sweep --config=v3_tiny --folder=runs/scoring --seeds=3 \\
      --axis model.moe.router.scoring=sigmoid,softmax
    deepseek-jax sweep --folder=runs/scoring          # goes on
    deepseek-jax sweep ... --slurm                    # writes sweep.sbatch
    deepseek-jax sweep ... --match=active_params      # arms of equal cost

Several --axis make every combination; the first value of each is the arm that
the others are compared with. Each run is a folder in --folder, made by
`pretrain` in a process of its own: what has ended is not run again, what was
cut short goes on. At the end compare.html has tables and curves. --match solves
the widths of FFN and experts (--match_by=depth: the repeats of the last layers)
until every arm has as many active_params, params or flops as the first.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

from deepseek_jax import config as configs
from deepseek_jax import files
from deepseek_jax.cli import (
  arms,
  common,
  compare,
  experiment_file,
  post_training,
  side_by_side,
  training,
)
from deepseek_jax.config_changes import with_defaults
from deepseek_jax.errors import START_AGAIN, InputError, Preempted
from deepseek_jax.plan import match as matching
from deepseek_jax.record import results
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.folder import as_json

_CONFIG = common.define_config()
flags.declare_key_flag('config')
_FOLDER = flags.DEFINE_string('folder', None, 'Folder of the sweep.')
_AXIS = flags.DEFINE_multi_string(
  'axis', [], 'field=value,value: what differs; may be given several times.'
)
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs of each arm.')
_MATCH = flags.DEFINE_string(
  'match', None, 'What arms have as much of: active_params, params or flops.'
)
_BY = flags.DEFINE_enum(
  'match_by', 'width', matching.KNOBS, 'What --match changes.'
)
_SLURM = flags.DEFINE_bool('slurm', False, 'Write a SLURM array; run nothing.')
_ONLY = flags.DEFINE_integer('only', None, 'Run this run of the sweep alone.')
_DRY = flags.DEFINE_bool('dry', False, 'Say what would run, and end.')
flags.adopt_module_key_flags(training)
FILE = 'sweep.json'

_SBATCH = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={folder}/slurm-%a.log
#SBATCH --requeue
# One run for each task; add what your cluster asks for (time, GPUs, account).
srun {command} --only="$SLURM_ARRAY_TASK_ID"
status=$?
# These deserve another start: preempted, hung, killed.
case $status in {again}) scontrol requeue "$SLURM_JOB_ID";; esac
exit $status
"""


def planned(folder: Path) -> list[arms.ArmRun]:
  """Returns the runs of a sweep: those that the flags make, or the folder's.

  Raises:
    InputError: flags and folder name different sweeps, or neither names one.
  """
  path = folder / FILE
  if _CONFIG.value is None:
    _check_going_on()
    if not path.exists():
      raise InputError(
        f'--folder={folder}: holds no sweep; give --config and --axis'
      )
    rows = files.load_json(str(path)).get('runs', [])
    return [
      arms.ArmRun(
        r['name'], configs.from_dict(RunConfig, r['config']), r['note']
      )
      for r in rows
    ]
  if 'recipe' in _CONFIG.value:
    raise InputError('--config: is a plan; name a recipe, or a file with one')
  if not _AXIS.value:
    raise InputError('--axis: give at least one field=value,value')
  axes = [arms.axis(text) for text in _AXIS.value]
  fields = [field for field, _ in axes]
  twice = [field for field in fields if fields.count(field) > 1]
  if twice:
    raise InputError(f'--axis: {twice[0]} is given twice')
  made = arms.runs(_CONFIG.value, axes, _SEEDS.value, _MATCH.value, _BY.value)
  for one in made:
    post_training.check_text(one.config)
  text = json.dumps(as_plain(made), indent=2) + '\n'
  if path.exists():
    there = with_defaults(
      files.load_json(str(path)), {'runs': [run._asdict() for run in made]}
    )
    if there != json.loads(text):
      raise InputError(
        f'--folder={folder}: holds another sweep; choose another, or leave out'
        ' all flags but --folder to go on with it'
      )
  if not _DRY.value:
    folder.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as scratch:
      scratch.write_text(text)
  return made


def _check_going_on() -> None:
  """Raises InputError for flags that a sweep under way can't heed."""
  for flag in (_AXIS, _SEEDS, _MATCH):
    if flag.present:
      raise InputError(
        f'--{flag.name}: needs --config, too; without it the sweep of --folder'
        ' goes on as it was begun'
      )


def as_plain(made: list[arms.ArmRun]) -> dict:
  """Returns the runs of a sweep as JSON values."""
  return {
    'runs': [
      {'name': run.name, 'config': as_json(run.config), 'note': run.note}
      for run in made
    ]
  }


def itself(folder: Path) -> list[str]:
  """Returns the command that goes on with a sweep, without --only."""
  own = [a for a in sys.argv[1:] if a.startswith(('--config=', '-config='))]
  # A user's classes are in the file; fields are those of sweep.json.
  files_ = [a for a in own if a.partition('=')[2].endswith('.py')]
  given = [f'--own={a.partition("=")[2]}' for a in files_]
  steps = training.profiled()
  given += [f'--profile={steps}'] if steps else []
  given += ['--verbose'] if common.verbose() else []
  program = [sys.executable, '-m', 'deepseek_jax.cli.main', 'sweep']
  return [*program, f'--folder={folder}', *given]


_OWN = flags.DEFINE_string(
  'own', None, "The file of a going sweep's own classes."
)


def write_slurm(folder: Path, count: int) -> Path:
  """Writes a SLURM array of all runs; returns its path."""
  path = folder / 'sweep.sbatch'
  text = _SBATCH.format(
    name=folder.name,
    last=count - 1,
    folder=folder,
    command=shlex.join(itself(folder)),
    again='|'.join(map(str, START_AGAIN)),
  )
  with files.whole(path) as scratch:
    scratch.write_text(text)
  return path


def run_all(made: list[arms.ArmRun], folder: Path) -> list[str]:
  """Runs what has not ended, one after the other; returns lines on failures.

  Raises:
    Preempted: a run was; the sweep goes on with it.
  """
  wrong = []
  for number, run in enumerate(made):
    if results.read(folder / run.name):
      print(f'{number + 1}/{len(made)} {run.name}: has ended', flush=True)
      continue
    print(f'{number + 1}/{len(made)} {run.name}', flush=True)
    quiet = ['--quiet'] if common.quiet() else []
    status = subprocess.run(
      [*itself(folder), f'--only={number}', *quiet]
    ).returncode
    if status == Preempted.status:
      raise Preempted(f'preempted in {run.name}; the same command goes on')
    if status:
      wrong.append(f'{run.name}: ended with status {status}')
  return wrong


def main(argv: list[str]) -> None:
  """Runs the sweep of a folder, or one run of it."""
  del argv
  if not _FOLDER.value:
    raise InputError('give --folder=FOLDER, where the runs go')
  if _OWN.value:
    experiment_file.load_flag(_OWN)
  folder = Path(_FOLDER.value)
  made = planned(folder)
  if _ONLY.value is not None:
    if not 0 <= _ONLY.value < len(made):
      raise InputError(
        f'--only={_ONLY.value}: the sweep has runs 0 to {len(made) - 1}'
      )
    run = made[_ONLY.value]
    training.train(run.config, folder / run.name)
    return
  # Seeds of an arm share its note.
  notes = {run.name.rpartition('-seed=')[0]: run.note for run in made}
  for arm, note in notes.items():
    if note:
      print(f'matched: {arm}: {note}')
  if _DRY.value:
    print('\n'.join(run.name for run in made))
    return
  if _SLURM.value:
    path = write_slurm(folder, len(made))
    print(f'{len(made)} runs: sbatch {path}')
    return
  wrong = run_all(made, folder)
  ended = [r.name for r in made if results.read(folder / r.name)]
  if ended:
    page = folder / 'compare.html'
    given = [str(folder / name) for name in ended]
    metric = compare.METRIC
    if not made[0].config.data.heldout_fraction:
      metric = 'loss'
    side_by_side.compare(given, metric, page, f'Sweep {folder.name}', None)
  for line in wrong:
    print(f'error: {line}', file=sys.stderr)
  if wrong:
    sys.exit(1)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main)
