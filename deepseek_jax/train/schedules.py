"""Schedules what changes over a run: rates, batch size, MTP weight.

Learning rate, batch size, MTP weight and bias rate count tokens, as in the
papers; phase borders are shares of the run, so that a tiny run has the shape of
the published one (V3 section 4.2: 14.8T tokens, phases at 10T, 14.3T and
14.633T).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from deepseek_jax.config import above, at_least, finite, within
from deepseek_jax.errors import InputError

_V3_TOKENS = 14.8e12


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Describes the learning rate over a run.

  Attributes:
    kind: 'v3' (constant, cosine to 1/10, constant, then 1/30 of the peak),
      'v2' (times 0.316 at two borders), 'cosine', 'wsd' (linear decay at the
      end) or 'constant'.
    peak: highest learning rate.
    warmup: steps of linear warm-up.
    end: what 'cosine' and 'wsd' fall to, as a share of the peak: the rate of
      the step that would follow the last, which still is a step above it.
    borders: of 'v2': where it drops, as shares of the run; of 'wsd': where the
      decay starts (first value).
  """

  kind: Literal['v3', 'v2', 'cosine', 'wsd', 'constant'] = 'v3'
  peak: float = 2.2e-4
  warmup: int = 2000
  end: float = 0.1
  borders: tuple = (0.6, 0.9)

  def __post_init__(self) -> None:
    """Raises InputError for a number or a border out of range."""
    above(self, peak=0)
    at_least(self, warmup=0)
    within(self, end=(0, 1))
    self._check_borders()

  def _check_borders(self) -> None:
    """Raises InputError unless the borders are sorted shares in [0, 1)."""
    used = {'v2': self.borders, 'wsd': self.borders[:1]}.get(self.kind)
    if used is None:
      return
    inside = all(0 <= b < 1 for b in used)  # NaN is refused, too
    if not used or not inside or list(used) != sorted(used):
      raise InputError(
        f'borders = {self.borders}: {self.kind} needs shares of the run from 0'
        ' to below 1, in rising order'
      )


def _cosine(share: jax.Array) -> jax.Array:
  """Returns half a cosine from 1 to 0 over shares 0 to 1."""
  return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))


def _shape(cfg: ScheduleConfig, share: jax.Array) -> jax.Array:
  """Returns the learning rate over its peak, at a share of the run."""
  if cfg.kind == 'v3':
    # Constant to 10T, cosine to a tenth at 14.3T, from 14.633T 7.3e-6.
    trillion = share * _V3_TOKENS / 1e12
    decayed = 0.1 + 0.9 * _cosine((trillion - 10) / 4.3)
    return jnp.where(trillion < 14.633, decayed, 7.3e-6 / 2.2e-4)
  if cfg.kind == 'v2':
    return 0.316 ** sum((share >= b).astype(jnp.float32) for b in cfg.borders)
  if cfg.kind == 'cosine':
    return cfg.end + (1 - cfg.end) * _cosine(share)
  if cfg.kind == 'wsd':
    start = cfg.borders[0]
    left = jnp.clip((1 - share) / (1 - start), 0, 1)
    return cfg.end + (1 - cfg.end) * left
  return jnp.ones_like(share)


def learning_rate(
  cfg: ScheduleConfig,
  step: jax.Array | int,
  tokens: jax.Array | float,
  total_tokens: float,
) -> jax.Array:
  """Returns the float32 learning rate of 0-based `step`, after `tokens`."""
  share = jnp.asarray(tokens, jnp.float32) / total_tokens
  warm = (jnp.asarray(step, jnp.float32) + 1) / max(cfg.warmup, 1)
  return cfg.peak * _shape(cfg, share) * jnp.minimum(warm, 1.0)


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
  """Describes a value that changes once.

  Attributes:
    first: value at the start.
    last: value after the change.
    until: share of the run at which it changes.
  """

  first: float
  last: float
  until: float

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, first=0, last=0)
    finite(self, 'until')  # before or after the whole run, too

  def at(self, tokens: jax.Array | float, total_tokens: float) -> jax.Array:
    """Returns the float32 value after `tokens` of `total_tokens`."""
    share = jnp.asarray(tokens, jnp.float32) / total_tokens
    return jnp.where(share < self.until, self.first, self.last)


def v3_mtp_weight() -> SwitchConfig:
  """Returns 0.3 for the first 10T of 14.8T tokens, then 0.1."""
  return SwitchConfig(0.3, 0.1, 10e12 / _V3_TOKENS)


def v3_bias_rate() -> SwitchConfig:
  """Returns 0.001 for the first 14.3T of 14.8T tokens, then 0 (frozen)."""
  return SwitchConfig(0.001, 0.0, 14.3e12 / _V3_TOKENS)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Describes sequences per step, ramped from `start` to `size`.

  The ramp takes `ramp_tokens` tokens.

  Attributes:
    size: sequences per step after the ramp.
    start: sequences per step at first.
    ramp_tokens: length of the ramp (0: none). The papers leave its shape open;
      here it is linear, in steps of `increment`.
    increment: sequences added at a time; each size compiles once.
    accumulate: micro-batches that a step is split into.
  """

  size: int
  start: int = 0
  ramp_tokens: float = 0.0
  increment: int = 1
  accumulate: int = 1

  def __post_init__(self) -> None:
    """Raises InputError for sizes that make no ramp of whole micro-batches."""
    at_least(self, size=1, accumulate=1, increment=1, start=0, ramp_tokens=0)
    self._check_accumulate()
    if self.ramp_tokens and not 0 < self.start <= self.size:
      raise InputError(f'start = {self.start}: must lie in 1..{self.size}')

  def _check_accumulate(self) -> None:
    """Raises InputError unless micro-batches divide every size of the ramp."""
    names = ['size', 'start', 'increment'] if self.ramp_tokens else ['size']
    for name in names:
      number = getattr(self, name)
      if number % self.accumulate:
        raise InputError(
          f'accumulate = {self.accumulate}: must divide {name} = {number}, for'
          ' micro-batches of one size; change one of them'
        )

  def after(self, sequences: int) -> int:
    """Returns the next size of the ramp."""
    return min(sequences + self.increment, self.size)

  def at(self, tokens: int) -> int:
    """Returns the sequences in the step that begins after `tokens`."""
    if tokens >= self.ramp_tokens:
      return self.size
    grown = (self.size - self.start) * tokens / self.ramp_tokens
    return self.start + int(grown // self.increment) * self.increment
