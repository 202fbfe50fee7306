"""Lets a model improve itself: it learns from its own answers, level by level.

    python -m experiments.evolve --workdir=runs/evolve
    python -m experiments.evolve --workdir=runs/control --verify=false
    python -m experiments.evolve --workdir=runs/mine --task=task.json \\
      --start=runs/sft

Rounds of sampling, verifying, keeping the best, training; when the held-out
accuracy of a level passes a bar, the next one begins. Without --task the levels
are sums of 2 to 5 digits, for a model that is trained on those of 2 first.
The problems of a task of one's own need a whole number 'level'; --start is a
run that knows the first. The same command goes on with what has not ended.
"""

from pathlib import Path

from absl import flags

from deepseek_jax.cli import changes, common
from deepseek_jax.config_changes import changed
from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain
from deepseek_jax.posttrain.evolve import Evolve
from deepseek_jax.posttrain.evolve_recipe import EvolveRecipe
from deepseek_jax.record.report import evolve_page
from deepseek_jax.run.steps import shared_programs

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all rounds.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of weights, data and answers.')
_VERIFY = flags.DEFINE_bool(
  'verify', True, 'False keeps answers whatever they are worth: a control.'
)
_TASK = flags.DEFINE_string('task', '', 'A task whose problems have a level.')
_START = flags.DEFINE_string('start', '', 'Folder of the run that begins.')
_PRETRAINED = flags.DEFINE_string(
  'pretrained', '', 'Folder of a base, such as runs/r1/1-base; spares one.'
)
_CHANGE = flags.DEFINE_multi_string(
  'change', [], 'field=value of the recipe; may be given several times.'
)
flags.mark_flags_as_required(['workdir'])


def main(argv: list[str]) -> None:
  """Runs what is left of the rounds, then writes table and picture."""
  del argv
  folder = Path(_WORKDIR.value)
  own = {
    'base.seed': _SEED.value,
    'verify': _VERIFY.value,
    'task': _TASK.value,
    'start': _START.value,
    'pretrained': _PRETRAINED.value,
  }
  recipe = changed(EvolveRecipe(), changes.parsed(_CHANGE.value, own))
  for name in ('start', 'pretrained'):
    run_folder = getattr(recipe, name)
    if run_folder and not Path(run_folder, 'config.json').is_file():
      raise InputError(
        f'{name} = {run_folder!r}: holds no run (config.json); give the folder'
        ' of one'
      )
  chain.claim(folder, recipe)
  with shared_programs():  # rounds are one program
    Evolve(recipe, folder, console=not common.quiet()).run()
  page = evolve_page.write(folder)
  print((folder / 'evolve.md').read_text(), end='')
  print(f'report: {page.absolute()}')


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
