"""Skips updates that are not finite or far out of line, before they apply.

It keeps running means of the loss and the gradient norm over accepted steps
only, so a bad batch never moves what it is judged by. (optax.apply_if_finite
applies the non-finite update once its limit is passed.)
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import at_least, within
from deepseek_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """Describes when an update is skipped, and when a run gives up.

  Attributes:
    sigma: a loss or gradient norm this many deviations above its mean is an
      explosion; 0 judges finiteness only, as GRPO always does: its loss is
      about 0, and a round without rewards that differ has no gradient.
    warmup: accepted steps before explosions are judged.
    decay: of the running means.
    patience: skips in a row after which the run stops with status 78.
  """

  sigma: float = 6.0
  warmup: int = 50
  decay: float = 0.98
  patience: int = 10

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, sigma=0, warmup=0, patience=1)
    within(self, decay=(0, 1), ends='()')
    if self.sigma and self.warmup < 1:
      raise InputError(
        f'warmup = {self.warmup}: must be at least 1, for there is nothing to'
        ' compare the first step with'
      )


class GateState(NamedTuple):
  """Holds running means over accepted steps, and how many were skipped."""

  mean: jax.Array  # [2] of loss and gradient norm
  square: jax.Array  # [2] mean squared deviation
  accepted: jax.Array  # int32
  skipped: jax.Array  # int32
  streak: jax.Array  # int32, skips in a row


def initial_gate() -> GateState:
  """Returns the gate's state before the first step."""
  zero = jnp.int32(0)
  # Distinct buffers: the state is donated, and no buffer may be twice.
  return GateState(
    jnp.zeros(2), jnp.zeros(2), zero, jnp.int32(0) + 0, jnp.int32(0) + 0
  )


# A deviation is never taken as smaller than this share of the mean: steady
# runs have tiny ones, and an ordinary batch must not look like an explosion.
_LEAST_DEVIATION = 0.05
_LEAST_KNOWN = 2.0**-63  # the root of float32's least normal number


def judge(
  cfg: GateConfig,
  state: GateState,
  loss: jax.Array,
  grad_norm: jax.Array,
  sound: jax.Array | bool = True,
) -> tuple[jax.Array, GateState]:
  """Returns whether to apply the update (bool scalar), and the next GateState.

  Args:
    cfg: the gate's configuration.
    state: before the step.
    loss: scalar of the global batch.
    grad_norm: scalar, norm of its gradient.
    sound: whether the update itself is finite.
  """
  seen = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  # Not finite: skipped, whatever the means are.
  ok = jnp.isfinite(seen).all() & sound
  if cfg.sigma:
    # An explosion lies `sigma` deviations above its mean.
    least = _LEAST_DEVIATION * jnp.abs(state.mean)
    deviation = jnp.maximum(jnp.sqrt(state.square), least)
    # A mean whose square underflows float32 (0 is one) gives no deviation.
    deviation = jnp.where(least > _LEAST_KNOWN, deviation, jnp.inf)
    calm = (seen <= state.mean + cfg.sigma * deviation).all()
    ok = ok & (calm | (state.accepted < cfg.warmup))
  # A skipped step moves no mean.
  seen = jnp.where(ok, seen, state.mean)
  # Averages plainly at first, then with the decay.
  rate = jnp.maximum(1 - cfg.decay, 1 / (state.accepted + 1))
  # Running mean, and mean squared deviation in Welford's form.
  error = seen - state.mean
  mean = state.mean + rate * error
  most = jnp.finfo(jnp.float32).max  # infinity would never leave the mean
  apart = jnp.minimum(error * (seen - mean), most)
  square = state.square + rate * (apart - state.square)
  keep = lambda new, old: jnp.where(ok, new, old)
  return ok, GateState(
    keep(mean, state.mean),
    keep(square, state.square),
    state.accepted + ok,
    state.skipped + ~ok,
    jnp.where(ok, 0, state.streak + 1),
  )
