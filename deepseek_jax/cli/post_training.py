"""Ends a run of post-training: prints what it reached, writes its report.

It learns from conversations, from answers to a task, or from teachers; one that
reads text is ended by `finish`.
"""

from pathlib import Path

from deepseek_jax.cli.finish import conclude, size_facts
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record.metrics import read
from deepseek_jax.record.report.page import Sample
from deepseek_jax.rl import examples
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.run import sources
from deepseek_jax.train import evaluate


def launcher(config: loop.RunConfig) -> str:
  """Returns the launcher whose runs are like this one."""
  if isinstance(config.objective, DistillConfig):
    return 'distill'
  if config.rollouts is not None:
    return 'grpo'
  return 'pretrain' if config.chat is None else 'sft'


def check_text(config: loop.RunConfig) -> None:
  """Raises InputError for a run that reads no text."""
  name = launcher(config)
  if name != 'pretrain':
    raise InputError(
      f'chat = {config.chat.format!r}: this run reads no text; start it with'
      f' experiments.{name}'
    )


def finish(run: loop.Run, workdir: Path) -> None:
  """Ends a run as its launcher does; every process must ask."""
  ends = {'distill': distilled, 'grpo': reinforced, 'sft': tuned}
  ends[launcher(run.config)](run, workdir)


def tuned(run: loop.Run, workdir: Path) -> None:
  """Reports the held-out answers, and what is learnt of the first examples."""
  state = placement.to_first(run.state._replace(moments=None))
  if not distributed.first():
    return
  variables = {'params': state.params, 'buffers': state.buffers}
  facts = size_facts(run)
  if run.store.heldout:
    heldout = sources.heldout(run.store, run.config, None)
    bits = evaluate.bits_per_byte(run.model, variables, heldout)
    facts = {
      'held-out bits per byte of answers': bits,
      'held-out answers': len(run.store.heldout),
    } | facts
  samples = [
    Sample(where, f'{text}\n{marks}', 'what is learnt')
    for where, text, marks in examples.shown(
      run.store.train[: run.config.chat.shown], run.store.tokenizer()
    )
  ]
  conclude(workdir, facts, samples)


def reinforced(run: loop.Run, workdir: Path) -> None:
  """Reports rewards: of held-out prompts before and after, and of rounds.

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


def distilled(run: loop.Run, workdir: Path) -> None:
  """Reports the losses, and held-out answers or rewards."""
  rows = read(workdir)
  told = lambda name: [row[name] for row in rows if name in row]
  losses, rewards = told('loss'), told('heldout_reward')
  facts = {'loss of the first step': losses[0], 'of the last': losses[-1]}
  config = run.config
  if config.rollouts is not None:
    if rewards:
      facts |= {'first held-out reward': rewards[0], 'the last': rewards[-1]}
  elif run.store.heldout:
    held = sources.heldout(run.store, config, None)
    facts |= {
      'held-out bits per byte of answers': evaluate.bits_per_byte(
        run.model, run.variables, held
      ),
      'held-out answers': len(run.store.heldout),
    }
  facts |= size_facts(run)
  conclude(workdir, facts)
