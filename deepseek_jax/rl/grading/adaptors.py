"""Adapts verifiers of other libraries: math-verify, reasoning_gym, a user's.

The libraries are optional, the extra 'verifiers', and imported when first used.
"""

import dataclasses
import functools
import runpy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from deepseek_jax.errors import InputError, install


def _missing(error: ImportError) -> InputError:
  """Returns the InputError for a library that is not installed."""
  return InputError(f'{error.name}: is not installed, {install("verifiers")}')


@dataclasses.dataclass(frozen=True)
class MathVerify:
  """Compares mathematics with 'answer' by math-verify, as \\frac{1}{2} and 0.5.

  Its own time limits need the main thread and an alarm; the judge has its own.
  """

  needs: ClassVar[tuple[str, ...]] = ('answer',)

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns 1 for an equal value, else 0."""
    try:
      from math_verify import parse, verify
    except ImportError as error:
      raise _missing(error) from None
    right = parse(f'${problem["answer"]}$', parsing_timeout=None)
    said = parse(text, parsing_timeout=None)
    return float(bool(verify(right, said, timeout_seconds=None)))


@functools.cache
def _data_set(name: str) -> Any:
  """Returns a data set of reasoning_gym, which knows how to score."""
  try:
    import reasoning_gym
  except ImportError as error:
    raise _missing(error) from None
  return reasoning_gym.create_dataset(name, size=1, seed=0)


@dataclasses.dataclass(frozen=True)
class ReasoningGym:
  """Scores by the data set of reasoning_gym that the problem's 'metadata' name.

  Attributes:
    place: where the answer stands, see `extract.answer`.
    partial: keeps scores between 0 and 1. Some data sets give 0.01 for any
      answer at all, so a score is rounded down to 0 or 1 by default.
  """

  place: str = 'answer'
  partial: bool = False
  needs: ClassVar[tuple[str, ...]] = ('answer', 'metadata')

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns the score."""
    from deepseek_jax.rl.grading import extract

    said = extract.answer(text, self.place)
    if said is None:
      return 0.0
    data_set = _data_set(problem['metadata']['source_dataset'])
    score = float(data_set.score_answer(said, dict(problem)))
    return score if self.partial else float(score == 1)


def gym_problems(name: str, count: int, seed: int, **fields: Any) -> list[dict]:
  """Returns problems of reasoning_gym as lines of a task file.

  Args:
    name: of the data set.
    count: how many.
    seed: of its generator.
    **fields: of the data set's configuration.
  """
  try:
    import reasoning_gym
  except ImportError as error:
    raise _missing(error) from None
  made = reasoning_gym.create_dataset(name, size=count, seed=seed, **fields)
  return [
    {
      'prompt': item['question'],
      'answer': item['answer'],
      'metadata': {**item['metadata'], 'source_dataset': name},
    }
    for item in made
  ]


@dataclasses.dataclass(frozen=True)
class Own:
  """Calls `score(text, problem)` of a Python file of the user's.

  Attributes:
    file: its path. It runs in the judge's process, which may be killed.
  """

  file: str = ''
  needs: ClassVar[tuple[str, ...]] = ()

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns what the function returns."""
    return _function(self.file)(text, problem)


@functools.cache
def _function(file: str) -> Callable:
  """Returns the function `score` of a file."""
  found = runpy.run_path(file).get('score')
  if not callable(found):
    raise InputError(f'{file}: has no function score(text, problem)')
  return found
