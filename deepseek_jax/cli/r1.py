"""Trains a small R1, from text to a student in a Hugging Face folder.

    python -m experiments.r1 --workdir=runs/r1
    python -m experiments.r1 --workdir=runs/other --seed=1 --change=rounds=100

A tiny V3 is pretrained on synthetic text, fine-tuned on the answers of a biased
teacher, reinforced with verifiers (GRPO), its base fine-tuned on what was
right, reinforced again, and distilled into a dense Llama. Held-out problems are
scored after each stage. The same command goes on with what has not ended;
r1.html shows all of it. --change=FIELD=VALUE changes a field of the recipe
(deepseek_jax/posttrain/r1_recipe.py).
"""

from pathlib import Path

from absl import flags

from deepseek_jax.cli import changes, common
from deepseek_jax.config_changes import changed
from deepseek_jax.posttrain import chain
from deepseek_jax.posttrain.r1 import R1Chain
from deepseek_jax.posttrain.r1_recipe import R1Recipe
from deepseek_jax.record.report import r1_page
from deepseek_jax.run.steps import shared_programs

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all stages.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of weights, data and rollouts.')
_CHANGE = flags.DEFINE_multi_string(
  'change', [], 'field=value of the recipe; may be given several times.'
)
_UNTIL = flags.DEFINE_string(
  'until', None, 'Ends after the stage of this name.'
)
flags.mark_flags_as_required(['workdir'])


def recipe() -> R1Recipe:
  """Returns the recipe that the flags ask for; InputError names a field."""
  own = {'seed': _SEED.value}
  return changed(R1Recipe(), changes.parsed(_CHANGE.value, own))


def main(argv: list[str]) -> None:
  """Runs what is left of the pipeline, then writes its page."""
  del argv
  folder = Path(_WORKDIR.value)
  made = R1Chain(recipe(), folder, console=not common.quiet())
  chain.claim(folder, made.recipe)
  with shared_programs():
    chain.run(made.stages(), folder, until=_UNTIL.value)
  page = r1_page.write(folder)
  print(f'report: {page.absolute()}')


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
