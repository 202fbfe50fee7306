"""Describes rounds of self-improvement."""

import dataclasses

from deepseek_jax.config import above, at_least, within
from deepseek_jax.errors import InputError
from deepseek_jax.posttrain.r1_recipe import R1Recipe


def _base() -> R1Recipe:
  """Returns the recipe of the model that begins: it knows the first level."""
  return R1Recipe(seq_len=135, most=110, cold=5e6, slots=64)


@dataclasses.dataclass(frozen=True)
class EvolveRecipe:
  """Describes the rounds; every field changes what is trained.

  Attributes:
    base: of the model that begins, where `start` names none.
    pretrained: folder of a run on the synthetic text, of base.model; '': one is
      trained.
    start: folder of a run that begins; '': the pretrained one is taught sums of
      one and of levels[0] digits.
    task: path of a task whose problems have a whole number 'level'; '': sums of
      as many digits as the level says.
    levels: of the sums that are made.
    problems: of each level that are made.
    bar: held-out greedy accuracy at which a level is passed.
    rounds: at most.
    asked, drawn: problems of a round, and answers of each.
    replayed: conversations of what the run that begins was fine-tuned on (a
      .jsonl file), and of each earlier level, that a round trains on beside all
      that was kept of its own level: the newest that were kept, or the model's
      answers to it at that time.
    tokens: that a round trains on.
    rate: highest learning rate of a round.
    measured: held-out problems of each level.
    verify: False keeps answers whatever they are worth.
  """

  base: R1Recipe = dataclasses.field(default_factory=_base)
  pretrained: str = ''
  start: str = ''
  task: str = ''
  levels: tuple[int, ...] = (2, 3, 4, 5)
  problems: int = 6000
  bar: float = 0.8
  rounds: int = 20
  asked: int = 1024
  drawn: int = 4
  replayed: int = 128
  tokens: float = 1.2e5
  rate: float = 4e-4
  measured: int = 50
  verify: bool = True

  def __post_init__(self) -> None:
    """Raises InputError for fields out of range or that do not fit."""
    at_least(self, problems=10, asked=1, drawn=1, replayed=0)
    at_least(self, measured=1)
    above(self, tokens=0, rate=0)
    within(self, bar=(0, 1), rounds=(1, 99))
    whole = all(type(level) is int and level > 0 for level in self.levels)
    if not whole or list(self.levels) != sorted(set(self.levels)):
      raise InputError(
        f'levels = {self.levels}: must be whole numbers above 0, ascending'
      )
    if self.task and not self.start:
      raise InputError(
        f'task = {self.task!r}: needs a model that knows its first level; give'
        ' start, the folder of its run'
      )
