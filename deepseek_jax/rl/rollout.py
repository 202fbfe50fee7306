"""Samples groups of answers, and lays out what is learnt from their rewards.

The engine and the trainer are one program: the log-probabilities that it
returns are compared with the trainer's own and the gap is a metric.
Legend: N prompts, G answers of a group, R rows, S tokens of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import above, at_least, within
from deepseek_jax.data import packing
from deepseek_jax.errors import InputError
from deepseek_jax.infer import kept_tokens
from deepseek_jax.infer.request import Answer, Request, Sampling
from deepseek_jax.record.metric import Metric
from deepseek_jax.rl.advantages import advantages
from deepseek_jax.rl.grpo import GRPOConfig

_PLAIN = GRPOConfig()
# What is said of a round, beside what the objective says of each update.
METRICS = {
  'reward': Metric('Reward', 'of an answer'),
  'reward_std': Metric('Reward, deviation'),
  'heldout_reward': Metric('Reward on held-out prompts'),
  'answer_length': Metric('Answer length', 'tokens'),
  'truncated': Metric('Answers cut at the limit', 'share'),
  'unscored': Metric('Answers without a reward', 'share'),
  'verifier_errors': Metric('Verifier errors', 'of a round'),
  'equal_groups': Metric('Groups with equal rewards', 'share'),
  'redrawn': Metric('Groups drawn in the place of these', 'share'),
  'mismatch_most': Metric('Sampler against trainer, largest', 'nats'),
  'mismatch_mean': Metric('Sampler against trainer, of a round', 'nats'),
  'acceptance': Metric('Drafts accepted', 'share'),
}


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Describes how answers are sampled.

  Attributes:
    prompts: N of a round.
    group: G, answers of a prompt.
    most: tokens of an answer.
    updates: mini-batches of a round, one update each (R1: 16). With several
      the policy at the round's beginning stays the old one of the ratio.
    epochs: times that a round is learnt from (R1: 1).
    redraws: with the objective's dynamic_sampling, at most so many times a
      round draws other prompts for groups whose rewards are equal.
    temperature: must be the objective's.
    top_k: other than 0 needs the objective's keep_sampling_mask.
    top_p: other than 1 needs it, too.
    drafts: tokens that the model's own multi-token prediction guesses at a
      time while it samples; the answers are the same. 0: none.
    slots: answers that are decoded together.
    reference: folder of a run of the same model whose weights the KL term
      compares with; '': the weights that this run begins with.
    compare_every: rounds between comparisons of the sampler's log-probs, and of
      its experts, with the trainer's, a forward pass each; 0: never. With
      several updates of a round log-probs are always compared.
    patience: after so many rounds in a row in which no group's rewards differ a
      line says so; 0: never.
    seconds: by the clock, that a verifier may take for an answer.
    processes: of verifiers.
    permuted: deals the rewards of a round out at random over all its answers:
      a control, from which nothing true can be learnt.
  """

  prompts: int = 32
  group: int = 16
  most: int = 128
  updates: int = 1
  epochs: int = 1
  redraws: int = 3
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  drafts: int = 0
  slots: int = 64
  reference: str = ''
  compare_every: int = 10
  patience: int = 10
  seconds: float = 10.0
  processes: int = 1
  permuted: bool = False

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range; two answers at least."""
    at_least(self, 'rollouts.', prompts=1, group=2, most=1)
    at_least(self, 'rollouts.', slots=1, processes=1, updates=1, epochs=1)
    at_least(self, 'rollouts.', redraws=0, top_k=0, drafts=0)
    at_least(self, 'rollouts.', compare_every=0, patience=0)
    above(self, 'rollouts.', temperature=0, seconds=0)
    within(self, 'rollouts.', ends='(]', top_p=(0, 1))
    if '\0' in self.reference:
      raise InputError(
        f'rollouts.reference = {self.reference!r}: is no path; name a folder'
      )
    if self.updates > self.prompts * self.group:
      raise InputError(
        f'rollouts.updates = {self.updates}: a round has only'
        f' {self.prompts * self.group} answers; lower it'
      )

  @property
  def steps(self) -> int:
    """Returns the updates that a round gives."""
    return self.updates * self.epochs

  @property
  def cuts(self) -> bool:
    """Returns whether answers are sampled from a part of the vocabulary."""
    return self.top_p != 1 or self.top_k != 0


class Rollout(NamedTuple):
  """Holds one sampled answer."""

  prompt: tuple[int, ...]
  tokens: tuple[int, ...]  # the end token with them
  sampled: tuple[float, ...]  # log-prob of each by the sampling distribution
  whole: bool  # ended by itself, not at the limit
  routes: np.ndarray | None = None  # of prompt and tokens, as `Event` has them
  kept: np.ndarray | None = None  # of tokens, as `Event` has them


def check(cfg: RolloutConfig, objective: GRPOConfig) -> None:
  """Raises InputError where sampler and trainer mean other distributions."""
  if cfg.temperature != objective.temperature:
    raise InputError(
      f'rollouts.temperature = {cfg.temperature}: objective.temperature ='
      f' {objective.temperature}; the ratio compares one distribution: set both'
      ' alike'
    )
  if cfg.cuts and not objective.keep_sampling_mask:
    name = 'top_p' if cfg.top_p != 1 else 'top_k'
    raise InputError(
      f'rollouts.{name} = {getattr(cfg, name)}: objective.keep_sampling_mask ='
      ' False; the trainer would compare with the whole vocabulary; set it to'
      ' True, or leave the cut out'
    )
  every = objective.reference_every
  if every % cfg.steps:
    raise InputError(
      f'objective.reference_every = {every}: must be a multiple of'
      f' rollouts.updates * rollouts.epochs = {cfg.steps}, as a round has one'
      ' reference'
    )
  if cfg.reference and (objective.kl == 'none' or every):
    raise InputError(
      f'rollouts.reference = {cfg.reference!r}: needs an objective with a kl'
      ' and reference_every = 0'
    )


def sample(
  engine: Any,
  prompts: Sequence[Sequence[int]],
  cfg: RolloutConfig,
  *,
  stop: Sequence[int],
  seed: int,
  first: int = 0,
  objective: GRPOConfig = _PLAIN,
) -> list[list[Rollout]]:
  """Returns G answers of each of N prompts.

  Args:
    engine: an `infer.engine.Engine`.
    prompts: token ids.
    cfg: see there.
    stop: tokens that end an answer.
    seed: with a prompt's place and an answer's number it alone decides what is
      drawn, whatever else runs.
    first: the place of the first prompt.
    objective: decides what is recorded beside the tokens; the engine must keep
      it, see `infer.engine_config.EngineConfig`.

  Raises:
    InputError: an answer ended with an error.
  """
  requests = [
    Request(
      tuple(prompt),
      max_new_tokens=cfg.most,
      n=cfg.group,
      logprobs=0,
      routes=objective.keep_routing,
      kept=objective.keep_sampling_mask and cfg.cuts,
      sampling=Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        # Seeds of a group are neighbours: groups lie G apart.
        seed=(seed + cfg.group * place) % 2**63,
        stop=tuple(stop),
      ),
    )
    for place, prompt in enumerate(prompts, start=first)
  ]
  words = kept_tokens.words_of(engine.model.config.vocab_size)
  # No bit at all is no limit.
  free = words if objective.keep_sampling_mask and not cfg.cuts else None
  return [
    [_rollout(request, answer, free) for answer in answers]
    for request, answers in zip(requests, engine.run(requests))
  ]


def _rollout(request: Request, answer: Answer, words: int | None) -> Rollout:
  """Returns what an engine answered.

  Args:
    request: what was asked.
    answer: of the engine.
    words: W, where tokens were drawn from all and that is to be recorded.

  Raises:
    InputError: the answer ended with an error.
  """
  if answer.finish == 'error':
    raise InputError(f'rollouts: an answer ended with an error: {answer.error}')
  kept = answer.kept
  if words is not None:
    kept = np.zeros((len(answer.tokens), words), np.uint32)
  return Rollout(
    request.prompt,
    answer.tokens,
    tuple(p.sampled for p in answer.logprobs),
    answer.finish == 'stop',
    answer.routes,
    kept,
  )


def varied(rewards: np.ndarray, cfg: GRPOConfig) -> np.ndarray:
  """Returns whether the rewards of a group differ, [N] bool; see `lesson`."""
  return advantages(rewards, cfg.advantage).varied


class Lesson(NamedTuple):
  """Holds what is learnt of rollouts, and what there is to say about them.

  Attributes:
    sequences: name -> array [n], one mapping for each answer that teaches
      something; one that is not trained if there is none.
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
    rewards: [N G], or [N G R] one by one; NaN where a verifier failed: such
      answers enter no mean, teach nothing and are counted. A length penalty is
      added to the sum, or is one more of them.
    cfg: the objective.

  Raises:
    InputError: shapes differ, or groups have one answer.
  """
  rewards = np.asarray(rewards, np.float64)
  shape = len(groups), len(groups[0]) if groups else 0
  fits = rewards.ndim in (2, 3) and rewards.shape[:2] == shape
  if not fits or any(len(g) != shape[1] for g in groups):
    raise InputError(
      f'rewards {list(rewards.shape)}: must be {list(shape)}, one for each'
      ' answer of groups of one size'
    )
  lengths = np.array([[len(r.tokens) for r in g] for g in groups])
  whole = np.array([[r.whole for r in g] for g in groups])
  made = advantages(_shaped(rewards, lengths, cfg), cfg.advantage)
  learns = made.scored & (whole | (not cfg.mask_truncated))
  differ = varied(rewards, cfg)
  if cfg.dynamic_sampling:
    learns = learns & differ[:, None]
  sequences = [
    _sequence(rollout, made.values[n, g])
    for n, group in enumerate(groups)
    for g, rollout in enumerate(group)
    if learns[n, g]
  ]
  if not sequences:  # a round that teaches nothing is a step all the same
    one = _sequence(groups[0][0], 0.0)
    sequences = [one | {'trained': np.zeros_like(one['trained'])}]
  total = rewards if rewards.ndim == 2 else np.nansum(rewards, axis=-1)
  known = total[made.scored]
  statistics = {
    'reward': known.mean() if known.size else np.nan,
    'reward_std': known.std() if known.size else np.nan,
    'equal_groups': 1 - differ.mean(),
    'unscored': 1 - made.scored.mean(),
    'truncated': 1 - whole.mean(),
    'answer_length': lengths.mean(),
  }
  return Lesson(sequences, {k: float(v) for k, v in statistics.items()})


def _shaped(
  rewards: np.ndarray, lengths: np.ndarray, cfg: GRPOConfig
) -> np.ndarray:
  """Returns the rewards with the length penalty, added or as one more."""
  if cfg.length_penalty is None:
    return rewards
  penalty = cfg.length_penalty(lengths)
  if rewards.ndim == 2:
    return rewards + penalty
  # An answer without a score stays without one.
  penalty = np.where(np.isnan(rewards).all(axis=-1), np.nan, penalty)
  return np.concatenate([rewards, penalty[..., None]], axis=-1)


def _sequence(rollout: Rollout, advantage: float) -> dict[str, np.ndarray]:
  """Returns the arrays of one answer, its prompt before it."""
  before, after = len(rollout.prompt), len(rollout.tokens)
  fill = lambda value: np.full(before, value, np.float32)
  more = {} if rollout.routes is None else {'routes': rollout.routes}
  if rollout.kept is not None:
    more['kept'] = np.pad(rollout.kept, ((before, 0), (0, 0)))
  return more | {
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
    InputError: no answer has a score, or one is longer than a row.
  """
  _check_scored(made)
  placed = packing.best_fit([len(s['tokens']) for s in made.sequences], length)
  placed += [[]] * (-len(placed) % rows)
  return _laid_out(made, placed, length, pad)


def _laid_out(
  made: Lesson, placed: list[list[int]], length: int, pad: int
) -> dict[str, np.ndarray]:
  """Returns the answers laid out in rows; padding has no experts."""
  out = packing.laid_out(made.sequences, placed, length, pad=pad)
  if 'routes' in out:
    out['routes'][out['segments'] == 0] = -1
  return out


def mini_batches(
  made: Lesson, length: int, rows: int, count: int, *, seed: int, pad: int = 0
) -> dict[str, np.ndarray]:
  """Returns the answers packed into `count` mini-batches of `rows` rows each.

  Which answers share a mini-batch is drawn; of one they keep their order.

  Args:
    made: what to learn.
    length: S.
    rows: of a mini-batch; those without an answer are padding.
    count: mini-batches.
    seed: of the draw.
    pad: the token of padding.

  Returns:
    Arrays [count * rows S], a mini-batch after the other.

  Raises:
    InputError: as for `batch`, or the answers do not fit.
  """
  _check_scored(made)
  sizes = np.array([len(s['tokens']) for s in made.sequences])
  order = np.arange(len(sizes))
  if count > 1:
    order = np.random.default_rng(seed).permutation(len(sizes))
  placed: list[list[int]] = []
  for part in np.array_split(order, count):
    own = packing.best_fit(sizes[part].tolist(), length)
    if len(own) > rows:
      raise InputError(
        f'train.batch.size = {rows}: {len(part)} answers do not fit so many'
        f' rows of {length} tokens; set it to {-(-len(sizes) // count)}, or'
        ' data.seq_len higher'
      )
    placed += [[int(part[n]) for n in row] for row in own]
    placed += [[]] * (rows - len(own))
  return _laid_out(made, placed, length, pad)


def _check_scored(made: Lesson) -> None:
  """Raises InputError where no answer has a score."""
  if made.statistics['unscored'] == 1:
    raise InputError(
      'rollouts: no answer has a score, so nothing can be learnt; look at the'
      ' rewards of the task'
    )
