"""Trains a model by reinforcement: answers are sampled, scored, learnt from.

    python -m experiments.grpo --config=grpo_tiny --workdir=runs/rl \\
      --config.data.path=task.json --config.init_from=runs/sft

data.path is a task: problems, how answers are scored, what is held out (see
deepseek_jax/rl/tasks.py). The held-out reward is measured before and after. A
run that was ended goes on from its last checkpoint, to the same weights.
"""

from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, post_training, process_flags
from deepseek_jax.errors import InputError
from deepseek_jax.run import fit as loop

_CONFIG = common.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a started run goes on from it.'
)
flags.mark_flags_as_required(['config', 'workdir'])
flags.declare_key_flag('config')
flags.adopt_module_key_flags(process_flags)


def main(argv: list[str]) -> None:
  """Runs the training, then reports."""
  del argv
  config = common.frozen(loop.RunConfig, _CONFIG.value)
  if config.rollouts is None:
    raise InputError(
      'rollouts = None: this run samples no answers; set --config.rollouts, or'
      ' fine-tune with experiments.sft'
    )
  run = loop.fit(config, _WORKDIR.value, console=not common.quiet())
  post_training.reinforced(run, Path(_WORKDIR.value))


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, join=process_flags.join)
