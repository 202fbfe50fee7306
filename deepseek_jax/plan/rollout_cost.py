"""Plans a round of reinforcement learning: sampling, scoring, updates.

Sampling is bound by the weights and caches that each decoded token reads, or by
FLOPs, whichever takes longer; the rest by FLOPs.
Legend: A answers of a round, n of them decoded together.
"""

import dataclasses
import math

from deepseek_jax.config import at_least
from deepseek_jax.plan import cost, flops, memory
from deepseek_jax.plan.report import Report


@dataclasses.dataclass(frozen=True)
class Published:
  """Holds what a paper says that reinforcement learning took.

  Attributes:
    name: of the stage.
    device: that it ran on.
    device_hours: over all devices.
    steps: updates.
    answers: of an update.
  """

  name: str
  device: str
  device_hours: float
  steps: int
  answers: int

  @property
  def seconds(self) -> float:
    """Returns the device-seconds of an answer: sampled, scored, learnt from."""
    return self.device_hours * cost.HOUR / (self.steps * self.answers)


# The paper on R1 (supplement of the version in Nature): 512 H800 for 198 hours;
# a batch is 32 questions of 16 answers, 8,192 of them are sampled at a time.
R1_ZERO = Published('R1-Zero', 'H800', 101e3, 10_400, 512)


@dataclasses.dataclass(frozen=True)
class RoundPlan:
  """Describes a round, as a run's configuration gives it.

  Attributes:
    answers: A.
    together: n, over all devices.
    prompt, answer: tokens.
    updates: of a round.
    passes: forward passes of the trainer over a round, beside the updates: for
      the old policy and the reference.
    rounds: of the run.
    reference: whether weights of a reference are held.
  """

  answers: int
  together: int
  prompt: int
  answer: int
  updates: int
  passes: int
  rounds: int
  reference: bool = False

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, 'round.', answers=2, together=1, prompt=1, answer=1)
    at_least(self, 'round.', updates=1, passes=0, rounds=1)


@dataclasses.dataclass(frozen=True)
class RolloutCost:
  """Holds what rounds of rollouts cost; times are in seconds, of a round.

  Attributes:
    round: what was asked.
    tokens: that a round samples.
    cache_bytes: KV caches of the answers decoded together, as configured, of a
      device's share.
    held_bytes: of a device while it trains, with the reference, a copy of the
      weights that is sampled from, and these caches; the copy is at most that,
      see `infer.prepared.prepare`.
    fits: whether the device's memory is large enough for that.
    decode_step: a token for each of these answers.
    decode, prefill: of all answers.
    scoring: forward passes of the trainer.
    update: all updates.
    device_hours, dollars: of the run.
    budget: rounds that `published` would pay for on these devices.
    published: of R1-Zero.
  """

  round: RoundPlan
  tokens: int
  cache_bytes: float
  held_bytes: float
  fits: bool
  decode_step: float
  decode: float
  prefill: float
  scoring: float
  update: float
  device_hours: float
  dollars: float
  budget: float
  published: Published = R1_ZERO

  @property
  def seconds(self) -> float:
    """Returns the time of a round; its parts follow each other."""
    return self.decode + self.prefill + self.scoring + self.update


def rollout_cost(made: Report, asked: RoundPlan) -> RolloutCost:
  """Returns what rounds cost under a plan's model, cluster and mesh.

  Args:
    made: the plan of an update.
    asked: of a round.
  """
  config, recipe, device = made.config, made.recipe, made.cluster.accelerator
  devices, peak = made.cluster.devices, device.bf16.value
  together = min(asked.together, asked.answers)
  # Half of an answer is cached while it is decoded, on average.
  length = asked.prompt + math.ceil(asked.answer / 2)
  held = memory.cache(config, length).configured * together / devices
  weights = made.memory[made.policy]['weights']
  reading = (weights + held) / device.memory_bandwidth.value
  work = min(flops.decode_flops(config, length).values()) * together
  step = max(reading, work / (devices * peak))
  decode = step * asked.answer * asked.answers / together
  reach = devices * peak * recipe.utilization
  whole = asked.prompt + asked.answer
  forward = lambda tokens: (
    sum(flops.count_flops(config, tokens).forward.values()) * asked.answers
  )
  prefill = forward(asked.prompt) / reach
  scoring = asked.passes * forward(whole) / reach
  update = asked.updates * made.time.costed
  total = decode + prefill + scoring + update
  hours = total * devices / cost.HOUR
  full = memory.cache(config, whole).configured * together / devices
  # A copy as it computes, and the reference as the parameters are, float32.
  wide = memory.BYTES['float32'] // memory.BYTES[config.compute.products]
  held = made.device_bytes + full + weights * (1 + wide * asked.reference)
  return RolloutCost(
    asked,
    asked.answers * asked.answer,
    full,
    held,
    held <= device.memory.value,
    step,
    decode,
    prefill,
    scoring,
    update,
    hours * asked.rounds,
    hours * asked.rounds * recipe.dollars,
    R1_ZERO.device_hours / hours,
  )
