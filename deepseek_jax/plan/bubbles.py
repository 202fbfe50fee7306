"""Computes the published bubbles of pipeline schedules (V3's table 2).

DeepSeek-V3 (arXiv:2412.19437), section 3.2. `pipeline.simulate` runs the
schedules themselves and knows nothing of these formulas.
"""

import dataclasses

from deepseek_jax.errors import InputError
from deepseek_jax.pipeline.simulate import Durations


@dataclasses.dataclass(frozen=True)
class Method:
  """Holds a row of V3's table 2.

  Multiples are of a pipeline without copies.

  Attributes:
    bubble: idle time of a rank per training step.
    weights: copies of a stage's weights per rank.
    activations: chunks' worth of activations alive on a rank, of which a
      whole micro-batch has `stages`.
  """

  bubble: float
  weights: int
  activations: int


SCHEDULES = ('1f1b', 'zb1p', 'dualpipe', 'dualpipev')


def method(schedule: str, stages: int, times: Durations) -> Method:
  """Returns bubble and memory of a schedule over `stages` pipeline stages.

  Raises:
    InputError: the schedule is unknown or needs an even number of stages.
  """
  F, B, W = times.forward, times.backward, times.weight
  if schedule == '1f1b':
    return Method((stages - 1) * (F + B), 1, stages)
  if schedule == 'zb1p':
    return Method((stages - 1) * (F + B - 2 * W), 1, stages)
  if schedule in ('dualpipe', 'dualpipev'):
    if stages % 2:
      raise InputError(f'stages = {stages}: {schedule} needs an even number')
    bubble = (stages // 2 - 1) * (times.pair + B - 3 * W)
    return Method(bubble, 2, stages + 1)
  raise InputError(f'schedule = {schedule!r}: must be one of {SCHEDULES}')
