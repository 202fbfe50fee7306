"""Runs reinforcement and self-improvement with their controls, over seeds.

    python -m experiments.r1_study --workdir=runs/r1-study
    python -m experiments.r1_study --workdir=runs/r1-study --arms=grpo,permuted
    python -m experiments.r1_study --workdir=runs/r1-study --minutes=30

Arms: grpo; permuted (rewards dealt out at random); sft (the same compute spent
on fine-tuning on rejection samples); floor (the untrained model); evolve and
unverified. What has ended is not run again, what was cut short goes on; the
estimated time is printed first. Results are written after every arm.
"""

import time
from pathlib import Path

from absl import flags

from deepseek_jax import files
from deepseek_jax.cli import changes, common
from deepseek_jax.config_changes import changed
from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain
from deepseek_jax.posttrain.study import ARMS, Study, StudyRecipe, markdown
from deepseek_jax.record import results
from deepseek_jax.run.steps import shared_programs

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the study.')
_SEEDS = flags.DEFINE_integer('seeds', 2, 'How many.')
_SEED = flags.DEFINE_integer('seed', 0, 'The first.')
_ARMS = flags.DEFINE_list('arms', list(ARMS), 'Which arms to run.')
_MINUTES = flags.DEFINE_float(
  'minutes', None, 'Begin no further arm after so many.'
)
_OUT = flags.DEFINE_string(
  'out', None, 'Results, without ending; .json and .md are written.'
)
_DRY = flags.DEFINE_bool('dry', False, 'Say what would run, and end.')
_CHANGE = flags.DEFINE_multi_string(
  'change', [], 'field=value of the recipe; may be given several times.'
)
flags.mark_flags_as_required(['workdir'])


def main(argv: list[str]) -> None:
  """Runs the arms that are left, the most valuable first."""
  del argv
  begun, folder = time.monotonic(), Path(_WORKDIR.value)
  own = {'r1.seed': _SEED.value, 'seeds': _SEEDS.value}
  recipe = changed(StudyRecipe(), changes.parsed(_CHANGE.value, own))
  wrong = [arm for arm in _ARMS.value if arm not in ARMS]
  if wrong or not _ARMS.value:
    raise InputError(f'--arms={",".join(wrong)}: must be of {list(ARMS)}')
  study = Study(recipe, folder, console=not common.quiet())
  left = study.left(_ARMS.value)
  minutes = study.seconds(_ARMS.value) / 60
  print(
    f'{len(left)} arms are left, about {minutes:.0f} minutes on two cores that'
    ' do nothing else',
    flush=True,
  )
  for number, arm in left:
    print(f'  seed {recipe.r1.seed + number}: {arm}, {ARMS[arm]}')
  if _DRY.value:
    return
  for number, arm in left:
    spent = (time.monotonic() - begun) / 60
    if _MINUTES.value is not None and spent > _MINUTES.value:
      print(f'{spent:.0f} minutes are spent: the same command goes on')
      break
    with shared_programs():
      study.run(number, arm)
    keep(study, folder)
  print(keep(study, folder), end='')


def keep(study: Study, folder: Path) -> str:
  """Writes the results so far; returns them as Markdown."""
  out = Path(_OUT.value) if _OUT.value else folder / 'r1-study'
  found = study.results() | {
    'versions': results.versions(),
    'machine': results.machine(),
  }
  chain.write(out.with_suffix('.json'), found)
  text = markdown(found)
  with files.whole(out.with_suffix('.md')) as scratch:
    scratch.write_text(text, 'utf-8')
  return text


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
