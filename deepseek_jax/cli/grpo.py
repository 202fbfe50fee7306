"""Trains a model by reinforcement: answers are sampled, scored, learnt from.

    python -m experiments.grpo --config=grpo_tiny --workdir=runs/rl \\
      --config.data.path=task.json --config.init_from=runs/sft

data.path is a task: problems, how answers are scored, what is held out (see
deepseek_jax/rl/tasks.py). The held-out reward is measured before and after. A
run that was ended goes on from its last checkpoint, to the same weights.
"""

from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, process_flags
from deepseek_jax.cli.finish import conclude, size_facts
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record.metrics import read
from deepseek_jax.run import fit as loop
from deepseek_jax.run import sources

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
  run = loop.fit(config, _WORKDIR.value)
  finish(run, Path(_WORKDIR.value))


def finish(run: loop.Run, workdir: Path) -> None:
  """Prints what the run reached and writes workdir/report.html.

  Every process takes part in the answers; the first one reports.
  """
  facts = _heldout(run)
  if not distributed.first():
    return
  rewards = [row['reward'] for row in read(workdir) if 'reward' in row]
  facts |= {
    'reward of the first round': rewards[0],
    'reward of the last round': rewards[-1],
    'rounds': len(rewards),
  }
  facts |= size_facts(run)
  conclude(workdir, facts)


def _heldout(run: loop.Run) -> dict[str, float]:
  """Returns the rewards of held-out prompts before and after the run."""
  if not run.store.task.heldout:
    return {}
  drawn = sources.batches(run.store, run.config)
  before, after = (
    drawn.answered(variables)['heldout_reward']
    for variables in (drawn.first(), run.variables)
  )
  return {
    'held-out reward before': before,
    'held-out reward after': after,
    'held-out prompts': len(run.store.task.heldout),
  }


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, join=process_flags.join)
