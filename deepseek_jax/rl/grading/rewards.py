"""Reads the rewards of a task: which verifiers score it, and how much each."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.rl.grading import adaptors, verifiers

KINDS = {
  'arithmetic': verifiers.Arithmetic,
  'countdown': verifiers.Countdown,
  'code': verifiers.Code,
  'exact': verifiers.Exact,
  'format': verifiers.InForm,
  'language': verifiers.Language,
  'length': verifiers.Length,
  'math_verify': adaptors.MathVerify,
  'reasoning_gym': adaptors.ReasoningGym,
  'own': adaptors.Own,
}


@dataclasses.dataclass(frozen=True)
class Reward:
  """Holds a verifier and what its score is multiplied by."""

  kind: str
  verifier: Any
  weight: float = 1.0
  only: str = ''  # a field: problems without it are not scored by this

  def applies(self, problem: Mapping[str, Any]) -> bool:
    """Returns whether a problem is scored by this."""
    return not self.only or self.only in problem

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns the weighted score; ValueError unless it is finite."""
    if not self.applies(problem):
      return 0.0
    score = float(self.verifier(text, problem))
    if not math.isfinite(score):
      raise ValueError(f'{self.kind} gave {score}')
    return self.weight * score


def read(values: Sequence[Mapping[str, Any]], where: str) -> tuple[Reward, ...]:
  """Returns rewards from [{'kind': 'countdown', 'weight': 1.0}, ...].

  Args:
    values: as a task file has them. 'weight' multiplies the score, 'only'
      names a field: problems without it are scored by the others alone.
    where: names the file in messages.

  Raises:
    InputError: names the field that is wrong.
  """
  if not values or not isinstance(values, list | tuple):
    raise InputError(
      f'{where}: rewards must be a list with at least one {{"kind": ...}}'
    )
  return tuple(
    _reward(v, f'{where}: rewards[{i}]') for i, v in enumerate(values)
  )


def _reward(value: Any, where: str) -> Reward:
  """Returns one reward."""
  if not isinstance(value, Mapping) or value.get('kind') not in KINDS:
    kind = value.get('kind') if isinstance(value, Mapping) else value
    raise InputError(f'{where}.kind = {kind!r}: must be one of {list(KINDS)}')
  fields = dict(value)
  kind, weight = fields.pop('kind'), fields.pop('weight', 1.0)
  only = fields.pop('only', '')
  if not isinstance(only, str):
    raise InputError(
      f'{where}.only = {only!r}: must be a field of the problems'
    )
  if isinstance(weight, bool) or not isinstance(weight, int | float):
    raise InputError(f'{where}.weight = {weight!r}: must be a number')
  if not math.isfinite(weight):
    raise InputError(f'{where}.weight = {weight!r}: must be finite')
  known = {f.name: f.default for f in dataclasses.fields(KINDS[kind])}
  for name, given in fields.items():
    if name not in known:
      raise InputError(
        f'{where}.{name}: no such field; {kind} has {list(known)}'
      )
    if type(given) is not type(known[name]):
      raise InputError(
        f'{where}.{name} = {given!r}: must be {type(known[name]).__name__}'
      )
  try:
    return Reward(kind, KINDS[kind](**fields), float(weight), only)
  except InputError as error:
    raise InputError(f'{where}.{error}') from None


def check(rewards: Sequence[Reward], problem: Mapping, where: str) -> None:
  """Raises InputError for a problem that lacks what its verifiers need."""
  if not any(reward.applies(problem) for reward in rewards):
    fields = [reward.only for reward in rewards]
    raise InputError(
      f'{where}: has none of {fields}, so no reward scores it; add one without'
      " 'only'"
    )
  for reward in rewards:
    if not reward.applies(problem):
      continue
    for name in reward.verifier.needs:
      if name not in problem:
        raise InputError(
          f'{where}: has no {name!r}, which the reward {reward.kind} needs'
        )


# Those that look at the answer itself: others look at its form or its length.
ACCURACY = frozenset(KINDS) - {'format', 'language', 'length'}


def is_right(
  rewards: Sequence[Reward],
  scores: Sequence[float],
  problem: Mapping[str, Any] | None = None,
) -> bool:
  """Returns whether every verifier of the answer itself gave it full marks.

  That is its weight; one without weight, or with a negative one, does not
  count. Where a task has none of these, all others have to give full marks.

  Args:
    rewards: of the task.
    scores: weighted, one of each.
    problem: that was answered; rewards for other problems do not count. None:
      all do.
  """
  marks = [
    (reward.kind in ACCURACY, score >= reward.weight * (1 - 1e-9))
    for reward, score in zip(rewards, scores, strict=True)
    if reward.weight > 0 and (problem is None or reward.applies(problem))
  ]
  counted = [full for accuracy, full in marks if accuracy]
  return bool(marks) and all(counted or [full for _, full in marks])
