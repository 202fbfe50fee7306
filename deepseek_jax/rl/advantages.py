"""Turns rewards into advantages, on the host in float64.

Legend: N groups, G answers of a group, R reward functions.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """Describes how an answer is compared with its group.

  Attributes:
    scale: what r - mean(r) is divided by: the standard deviation of the
      'group' (DeepSeekMath, R1), of the whole 'batch', or nothing ('none':
      V3.2, Dr. GRPO).
    std: with G - 1 ('sample') or G ('population') in its denominator. No
      paper says which; TRL, verl and tunix take 'sample'.
    eps: added to the standard deviation.
    several: several rewards of an answer are added up ('sum'), or made
      advantages one by one, added up and scaled over the batch ('each').
  """

  scale: Literal['none', 'group', 'batch'] = 'group'
  std: Literal['sample', 'population'] = 'sample'
  eps: float = 1e-6
  several: Literal['sum', 'each'] = 'sum'

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, 'advantage.', eps=0)


@dataclasses.dataclass(frozen=True)
class LengthPenaltyConfig:
  """Describes DAPO's soft penalty of long answers (arXiv:2503.14476, eq. 13).

  Attributes:
    most: tokens of the longest answer.
    soft: tokens before `most` over which the penalty grows from 0 to `weight`.
    weight: of the full penalty; 1 in DAPO.
  """

  most: int
  soft: int
  weight: float = 1.0

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, 'length_penalty.', most=1, soft=1)
    above(self, 'length_penalty.', weight=0)
    if self.soft > self.most:
      raise InputError(
        f'length_penalty.soft = {self.soft}: must be at most'
        f' length_penalty.most = {self.most}'
      )

  def __call__(self, lengths: np.ndarray) -> np.ndarray:
    """Returns what is added to the rewards of answers so long, -weight..0."""
    over = np.asarray(lengths, np.float64) - (self.most - self.soft)
    return -self.weight * np.clip(over / self.soft, 0, 1)


class Advantages(NamedTuple):
  """Holds the advantages of groups, and how far rewards could be compared.

  Attributes:
    values: [N G] float64; 0 where an answer has no reward.
    scored: [N G] bool; False where no reward is a finite number. Such an
      answer enters no mean, teaches nothing and is counted.
    varied: [N] bool, whether the group's rewards differ: their sum, or with
      several = 'each' any of them.
  """

  values: np.ndarray
  scored: np.ndarray
  varied: np.ndarray


def advantages(rewards: np.ndarray, cfg: AdvantageConfig) -> Advantages:
  """Returns the advantages of rewards [N G] or [N G R].

  NaN is a reward that is missing: of several, the others count. An infinite
  one makes its answer unscored.

  Raises:
    InputError: a group of one answer, which has nothing to compare with.
  """
  rewards = np.asarray(rewards, np.float64)
  if rewards.ndim == 2:
    rewards = rewards[..., None]
  if rewards.ndim != 3 or rewards.shape[1] < 2:
    raise InputError(
      f'rewards {list(rewards.shape)}: must be [groups, answers] with at least'
      ' 2 answers in a group; an answer alone has nothing to compare with'
    )
  scored = ~np.isnan(rewards).all(axis=-1) & ~np.isinf(rewards).any(axis=-1)
  each = np.where(scored[..., None], rewards, np.nan)
  summed = np.where(scored, np.nansum(np.nan_to_num(each), axis=-1), np.nan)
  varied = _varied(summed)
  if cfg.several == 'sum' or rewards.shape[-1] == 1:
    values = _scaled(summed, cfg)
  else:
    count = range(rewards.shape[-1])
    varied = np.any([_varied(each[..., r]) for r in count], axis=0)
    # Each reward by itself, so that none drowns in the spread of another.
    parts = [_scaled(each[..., r], cfg) for r in count]
    values = np.where(scored, sum(parts), np.nan)
    values = _centred(values) / _divisor(values.reshape(1, -1), cfg)
    values = np.where(scored, np.nan_to_num(values), 0.0)
  return Advantages(values, scored, varied)


def _varied(rewards: np.ndarray) -> np.ndarray:
  """Returns whether rewards [N G], NaN left out, differ within a group [N]."""
  low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
  high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
  return high > low


def _centred(rewards: np.ndarray) -> np.ndarray:
  """Returns rewards [N G] minus their group's mean, NaN left out."""
  count = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
  mean = np.nansum(rewards, axis=1, keepdims=True) / np.maximum(count, 1)
  return rewards - mean


def _divisor(rewards: np.ndarray, cfg: AdvantageConfig) -> np.ndarray:
  """Returns the deviation of each row's rewards plus eps [N 1]; 1 for 0."""
  # In shares of the largest, so that no square under- or overflows.
  centred = np.nan_to_num(_centred(rewards))
  largest = np.abs(centred).max(axis=1, keepdims=True, initial=0)
  unit = np.where(largest > 0, largest, 1.0)
  square = ((centred / unit) ** 2).sum(axis=1, keepdims=True)
  count = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
  most = np.maximum(count - (cfg.std == 'sample'), 1)
  out = unit * np.sqrt(square / most) + cfg.eps
  return np.where(out > 0, out, 1.0)


def _scaled(rewards: np.ndarray, cfg: AdvantageConfig) -> np.ndarray:
  """Returns the advantages of rewards [N G]; exactly 0 where they are equal.

  Rounding of the mean must not be divided by a tiny deviation.
  """
  out = _centred(rewards)
  if cfg.scale == 'group':
    out = out / _divisor(rewards, cfg)
  elif cfg.scale == 'batch':
    out = out / _divisor(rewards.reshape(1, -1), cfg)
  known = _varied(rewards)[:, None] & ~np.isnan(rewards)
  return np.where(known, out, 0.0)
