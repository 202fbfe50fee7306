"""Names the fields of a run that it ignores, and why.

A field is of use only beside others; set where it is not, it would be ignored
in silence. Values that are the default, or what happens anyway, are not named.
"""

from collections.abc import Iterator
from typing import Any

from deepseek_jax.data.config import DataConfig
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.run.config import EvaluateConfig, RunConfig
from deepseek_jax.train.schedules import BatchConfig

_SPOKEN = ('plain', 'r1_zero', 'template')  # forms that never tell of thinking


def lines(config: RunConfig) -> list[str]:
  """Returns a line for each field without effect: its name, value and why."""
  found = [*_batch(config), *_chat(config), *_rollouts(config)]
  return [
    f'{name} = {value!r}: is without effect, as {why}'
    for name, value, why in found
  ]


def _set(
  part: Any, default: Any, names: tuple[str, ...], prefix: str, why: str
) -> Iterator[tuple[str, Any, str]]:
  """Yields the fields of a part that differ from those of its default."""
  for name in names:
    value = getattr(part, name)
    if value != getattr(default, name):
      yield f'{prefix}.{name}', value, why


def _batch(config: RunConfig) -> Iterator[tuple[str, Any, str]]:
  """Yields what describes a ramp where there is none."""
  batch = config.train.batch
  if not batch.ramp_tokens:
    why = 'train.batch.ramp_tokens = 0 leaves no ramp'
    plain = BatchConfig(batch.size)
    if batch.start == batch.size:
      plain = BatchConfig(batch.size, start=batch.size)
    yield from _set(batch, plain, ('start', 'increment'), 'train.batch', why)


def _chat(config: RunConfig) -> Iterator[tuple[str, Any, str]]:
  """Yields what is read of text alone, where there is none."""
  if config.chat is None:
    return
  tasks = config.rollouts is not None
  what = 'a task' if tasks else 'conversations'
  if config.data.fim_rate not in (0, DataConfig().fim_rate):
    yield (
      'data.fim_rate',
      config.data.fim_rate,
      f'data.path is read as {what}, of which nothing is cut out',
    )
  names = ('stride', 'batch') if tasks else ('stride',)
  why = (
    'validation answers the held-out problems of the task'
    if tasks
    else 'validation reads each held-out answer whole'
  )
  yield from _set(config.evaluate, EvaluateConfig(), names, 'evaluate', why)
  if config.chat.thinking is not None and config.chat.format in _SPOKEN:
    yield (
      'chat.thinking',
      config.chat.thinking,
      f'chat.format = {config.chat.format!r} does not tell of thinking',
    )


def _rollouts(config: RunConfig) -> Iterator[tuple[str, Any, str]]:
  """Yields what rounds of rollouts do not heed, or the task decides."""
  rollouts, objective = config.rollouts, config.objective
  if rollouts is None:
    return
  plain = RolloutConfig()
  if isinstance(objective, DistillConfig):
    names = ('permuted', 'redraws', 'compare_every', 'patience')
    why = 'distillation learns every answer, whatever its reward'
    yield from _set(rollouts, plain, names, 'rollouts', why)
    return
  if not objective.dynamic_sampling:
    why = 'objective.dynamic_sampling = False draws no group again'
    yield from _set(rollouts, plain, ('redraws',), 'rollouts', why)
  if config.data.heldout_fraction:  # 0 is what a task without 'heldout' has
    why = "the task's own 'heldout' decides what is held out"
    plain = DataConfig()
    yield from _set(config.data, plain, ('heldout_fraction',), 'data', why)
