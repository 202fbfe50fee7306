"""Samples groups of answers, and lays out what is learnt from their rewards.

The engine and the trainer are one program: the log-probabilities that it
returns are compared with the trainer's own and the gap is a metric.
Legend: N prompts, G answers of a group, R rows, S tokens of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import above, at_least, within
from deepseek_jax.data import packing
from deepseek_jax.errors import InputError
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.transformer import Model
from deepseek_jax.rl import log_probs
from deepseek_jax.rl.advantages import advantages
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.train.objective import next_token


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Describes how answers are sampled.

  Attributes:
    prompts: N of a step.
    group: G, answers of a prompt.
    most: tokens of an answer.
    temperature: must be the objective's.
    top_p: other than 1 needs the objective's keep_sampling_mask.
    slots: answers that are decoded together.
    seconds: by the clock, that a verifier may take for an answer.
    processes: of verifiers.
    permuted: deals the rewards of a round out at random over all its answers:
      a control, from which nothing true can be learnt.
  """

  prompts: int = 32
  group: int = 16
  most: int = 128
  temperature: float = 1.0
  top_p: float = 1.0
  slots: int = 64
  seconds: float = 10.0
  processes: int = 1
  permuted: bool = False

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range; two answers at least."""
    at_least(self, 'rollout.', prompts=1, group=2, most=1)
    at_least(self, 'rollout.', slots=1, processes=1)
    above(self, 'rollout.', temperature=0, seconds=0)
    within(self, 'rollout.', ends='(]', top_p=(0, 1))


class Rollout(NamedTuple):
  """Holds one sampled answer."""

  prompt: tuple[int, ...]
  tokens: tuple[int, ...]  # the end token with them
  sampled: tuple[float, ...]  # log-prob of each by the sampling distribution
  whole: bool  # ended by itself, not at the limit


def check(cfg: RolloutConfig, objective: GRPOConfig) -> None:
  """Raises InputError where sampler and trainer mean other distributions."""
  if cfg.temperature != objective.temperature:
    raise InputError(
      f'rollout.temperature = {cfg.temperature}: objective.temperature ='
      f' {objective.temperature}; the ratio compares one distribution: set both'
      ' alike'
    )
  if cfg.top_p != 1:
    raise InputError(
      f'rollout.top_p = {cfg.top_p}: the engine does not return the tokens that'
      ' it kept, so the trainer could not renormalise over them; set it to 1'
    )


def sample(
  engine: Any,
  prompts: Sequence[Sequence[int]],
  cfg: RolloutConfig,
  *,
  stop: Sequence[int],
  seed: int,
) -> list[list[Rollout]]:
  """Returns G answers of each of N prompts.

  Args:
    engine: an `infer.engine.Engine`.
    prompts: token ids.
    cfg: see there.
    stop: tokens that end an answer.
    seed: with a prompt's place and an answer's number it alone decides what is
      drawn, whatever else runs.
  """
  requests = [
    Request(
      tuple(prompt),
      max_new_tokens=cfg.most,
      n=cfg.group,
      logprobs=0,
      sampling=Sampling(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        # Seeds of a group are neighbours: groups lie G apart.
        seed=(seed + cfg.group * place) % 2**63,
        stop=tuple(stop),
      ),
    )
    for place, prompt in enumerate(prompts)
  ]
  return [
    [
      Rollout(
        request.prompt,
        answer.tokens,
        tuple(p.sampled for p in answer.logprobs),
        answer.finish == 'stop',
      )
      for answer in answers
    ]
    for request, answers in zip(requests, engine.run(requests))
  ]


class Lesson(NamedTuple):
  """Holds what is learnt of rollouts, and what there is to say about them.

  Attributes:
    sequences: name -> array [n], one mapping for each answer.
    statistics: numbers by name.
  """

  sequences: list[dict[str, np.ndarray]]
  statistics: dict[str, float]


def lesson(
  groups: Sequence[Sequence[Rollout]], rewards: np.ndarray, cfg: GRPOConfig
) -> Lesson:
  """Returns the answers with their advantages and masks.

  Args:
    groups: [N][G] answers.
    rewards: [N G]; NaN where a verifier failed: such answers enter no mean,
      teach nothing and are counted.
    cfg: the objective.

  Raises:
    InputError: shapes differ, or groups have one answer.
  """
  rewards = np.asarray(rewards, np.float64)
  shape = len(groups), len(groups[0]) if groups else 0
  if rewards.shape != shape or any(len(g) != shape[1] for g in groups):
    raise InputError(
      f'rewards {list(rewards.shape)}: must be {list(shape)}, one for each'
      ' answer of groups of one size'
    )
  lengths = np.array([[len(r.tokens) for r in g] for g in groups])
  whole = np.array([[r.whole for r in g] for g in groups])
  shaped = rewards
  if cfg.length_penalty is not None:
    shaped = rewards + cfg.length_penalty(lengths)
  made = advantages(shaped, cfg.advantage)
  learns = made.scored & (whole | (not cfg.mask_truncated))
  if cfg.dynamic_sampling:  # the others teach nothing: draw more in their place
    learns = learns & made.varied[:, None]
  sequences = [
    _sequence(rollout, made.values[n, g])
    for n, group in enumerate(groups)
    for g, rollout in enumerate(group)
    if learns[n, g]
  ]
  known = rewards[made.scored]
  statistics = {
    'reward': known.mean() if known.size else np.nan,
    'reward_std': known.std() if known.size else np.nan,
    'equal_groups': 1 - made.varied.mean(),
    'unscored': 1 - made.scored.mean(),
    'truncated': 1 - whole.mean(),
    'answer_length': lengths.mean(),
  }
  return Lesson(sequences, {k: float(v) for k, v in statistics.items()})


def _sequence(rollout: Rollout, advantage: float) -> dict[str, np.ndarray]:
  """Returns the arrays of one answer, its prompt before it."""
  before, after = len(rollout.prompt), len(rollout.tokens)
  fill = lambda value: np.full(before, value, np.float32)
  return {
    'tokens': np.array([*rollout.prompt, *rollout.tokens], np.int32),
    'trained': np.concatenate([fill(0), np.ones(after, np.float32)]),
    'advantages': np.full(before + after, advantage, np.float32),
    'sampler': np.concatenate([fill(np.nan), np.float32(rollout.sampled)]),
  }


def batch(
  made: Lesson, length: int, rows: int, *, pad: int = 0
) -> dict[str, np.ndarray]:
  """Returns the answers packed into a multiple of `rows` rows [R S].

  Args:
    made: what to learn.
    length: S.
    rows: of a step; the last ones are filled up with padding.
    pad: the token of padding.

  Raises:
    InputError: nothing is left to learn, or an answer is longer than a row.
  """
  if not made.sequences:
    raise InputError(
      'rollouts: no answer is left to learn from'
      f' ({made.statistics["unscored"]:.0%} have no score,'
      f' {made.statistics["equal_groups"]:.0%} of the groups have equal'
      ' rewards); look at the verifier, or choose easier prompts'
    )
  sizes = [len(s['tokens']) for s in made.sequences]
  placed = packing.best_fit(sizes, length)
  placed += [[]] * (-len(placed) % rows)
  return packing.laid_out(made.sequences, placed, length, pad=pad)


def scorer(
  model: Model, cfg: GRPOConfig
) -> Callable[[Mapping, Mapping[str, Any]], np.ndarray]:
  """Returns (variables, batch) -> log-probs [R S] of the tokens that learn.

  By the trainer's own forward, of the distribution that was sampled from; 0
  elsewhere. It gives a batch its 'old' and, with other weights, 'reference'.
  """

  def run(variables: Mapping, batch: Mapping[str, jax.Array]) -> jax.Array:
    inputs = next_token(batch)
    routes = batch['routes'][:, :-1] if cfg.keep_routing else None
    out = model.apply(
      variables,
      inputs.tokens,
      positions=inputs.positions,
      segment_ids=inputs.segments,
      train=True,
      routes=routes,
    )
    kept = batch['kept'][:, 1:] if cfg.keep_sampling_mask else None
    said, _ = log_probs.sampled(
      out.hidden,
      model.head(variables),
      inputs.labels,
      batch['trained'][:, 1:] * inputs.weights,
      temperature=cfg.temperature,
      kept=kept,
    )
    return jnp.pad(said, ((0, 0), (1, 0)))  # the first token has none

  return jax.jit(run)


def mismatch(batch: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns how far the sampler is from the trainer, of a batch with 'old'.

  The largest and the mean gap of a token's log-prob. In one program with equal
  weights both are rounding.
  """
  on = (batch['trained'] > 0) & (batch['positions'] > 0)
  on &= ~np.isnan(batch['sampler'])
  gap = np.abs(batch['sampler'][on] - batch['old'][on])
  return {
    'mismatch_most': float(gap.max(initial=0)),
    'mismatch_mean': float(gap.mean()) if gap.size else 0.0,
  }
