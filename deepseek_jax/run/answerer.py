"""Samples answers to problems by a run's own weights, and scores them.

The engine is of the same program as the trainer, on the same devices. With
several processes all of them run it in step, and the first one scores.
Legend: N prompts, G answers of a prompt.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.parallel.placement import Placement
from deepseek_jax.rl import rollout
from deepseek_jax.rl.judge import Judge
from deepseek_jax.rl.rollout import Rollout
from deepseek_jax.run.config import RunConfig


class Answerer:
  """Holds the engine of a run, and the processes that score."""

  def __init__(
    self,
    config: RunConfig,
    model: Model,
    where: Placement,
    store: Any,
    say: Callable[[str], None],
  ):
    """Takes what is needed; allocates nothing.

    Args:
      config: of the run.
      model: that learns.
      where: its arrays lie.
      store: an `rl.TaskStore`.
      say: takes a line for the first error of a verifier.
    """
    self._config, self._model, self._where = config, model, where
    self._store, self._say = store, say
    cfg = config.rollouts
    self._judge = Judge(store.task.rewards, cfg.seconds, cfg.processes)
    self._engine: Engine | None = None
    self._told_error = False

  def groups(
    self, variables: dict, problems: Sequence[Mapping], seed: int, first: int
  ) -> list[list[Rollout]]:
    """Returns G answers of each problem, see `rollout.sample`."""
    prompts = [self._store.chat.prompt(p['prompt']) for p in problems]
    with self._where.use():
      return rollout.sample(
        self._ready(variables),
        prompts,
        self._config.rollouts,
        stop=self._store.chat.ends,
        seed=seed,
        first=first,
        objective=self._config.objective,
      )

  def greedy(self, variables: dict, problems: Sequence[Mapping]) -> list[float]:
    """Returns the rewards of the likeliest answers; NaN where there is none."""
    sampling = Sampling(temperature=0.0, stop=tuple(self._store.chat.ends))
    most = self._config.rollouts.most
    asked = [
      Request(
        tuple(self._store.chat.prompt(p['prompt'])), most, sampling=sampling
      )
      for p in problems
    ]
    with self._where.use():
      answers = self._ready(variables).run(asked)
    pairs = [(one.tokens, p) for [one], p in zip(answers, problems)]
    return self._scores(pairs)[0].sum(axis=-1).tolist()

  def rewards(
    self, groups: Sequence[Sequence[Rollout]], problems: Sequence[Mapping]
  ) -> tuple[np.ndarray, int]:
    """Returns rewards, NaN where a verifier failed, and how many did.

    They are [N G], or with advantage.several = 'each' one by one [N G R].
    """
    pairs = [
      (one.tokens, problem)
      for group, problem in zip(groups, problems)
      for one in group
    ]
    found, errors = self._scores(pairs)
    found = found.reshape(len(groups), len(groups[0]), -1)
    each = self._config.objective.advantage.several == 'each'
    return found if each else found.sum(axis=-1), errors

  @property
  def drafted(self) -> tuple[int, int]:
    """Returns how many drafts were accepted, of how many."""
    stats = self._engine.stats if self._engine is not None else {}
    return stats.get('accepted_drafts', 0), stats.get('drafts', 0)

  def _scores(
    self, pairs: Sequence[tuple[Sequence[int], Mapping]]
  ) -> tuple[np.ndarray, int]:
    """Returns rewards [. R] of pairs (tokens, problem), and how many fail."""
    verdicts: list[Any] = []
    if distributed.first():
      asked = [
        (self._text(tokens), {**problem, 'tokens': len(tokens)})
        for tokens, problem in pairs
      ]
      verdicts = self._judge(asked)
      self._tell(verdicts)
    # A time limit may be met in one process and missed in another.
    missing = [float('nan')] * len(self._judge.names)
    told = [
      [list(missing if v.scores is None else v.scores) for v in verdicts],
      sum(v.error is not None for v in verdicts),
    ]
    rewards, errors = json.loads(distributed.text_from_first(json.dumps(told)))
    return np.reshape(rewards, (len(pairs), len(missing))), errors

  def _tell(self, verdicts: Sequence[Any]) -> None:
    """Says once how a verifier fails; how often is a metric."""
    wrong = [v.error for v in verdicts if v.error is not None]
    if wrong and not self._told_error:
      self._told_error = True
      self._say(
        f'rewards: {len(wrong)} of {len(verdicts)} answers have none, the first'
        f' as {wrong[0]}; such answers are dropped and counted'
        ' (verifier_errors)'
      )

  def _text(self, tokens: Sequence[int]) -> str:
    """Returns an answer's text, without the token that ends it."""
    ends = self._store.chat.ends
    plain = [token for token in tokens if token not in ends]
    return self._store.tokenizer().decode(plain)

  def _ready(self, variables: dict) -> Engine:
    """Returns the engine with these weights."""
    if self._engine is not None:
      self._engine.load(variables)
      return self._engine
    cfg, objective = self._config.rollouts, self._config.objective
    context = self._config.data.seq_len + 1
    problems = (*self._store.task.train, *self._store.task.heldout)
    longest = max(len(self._store.chat.prompt(p['prompt'])) for p in problems)
    held = EngineConfig(
      slots=cfg.slots,
      context=context,
      page=min(64, context),
      budget=min(256, longest),  # a prompt in one chunk, and no wider
      drafts=cfg.drafts,
      queue=cfg.prompts * cfg.group,
      deterministic=True,
      routing=objective.keep_routing,
      kept=objective.keep_sampling_mask and cfg.cuts,
    )
    self._engine = Engine(self._model, variables, held)
    return self._engine
