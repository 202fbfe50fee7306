"""Extends a run: more tokens, where no step so far would have been another.

Learning rate, MTP weight and bias rate are functions of the share of a run's
tokens. A run may grow while they have not moved, as under 'constant', and under
'wsd' and 'v3' before the decay. What has switched already keeps the token at
which it did.
"""

import dataclasses

import jax
import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import schedules

# Fields that may differ between a run and the same run extended.
FIELDS = (
  'train.tokens',
  'train.mtp_weight.until',
  'train.bias_rate.until',
)
_POINTS = 512  # at which schedules are compared
_SWITCHES = ('mtp_weight', 'bias_rate')


def tokens_after(config: RunConfig, steps: int) -> int:
  """Returns the tokens that a run has read after its first steps."""
  batch, length, tokens = config.train.batch, config.data.seq_len, 0
  while steps and tokens < batch.ramp_tokens:
    tokens, steps = tokens + batch.at(tokens) * length, steps - 1
  return tokens + steps * batch.size * length


def problem(old: RunConfig, new: RunConfig, steps: int) -> str | None:
  """Returns why a run of `steps` steps can't go on as `new`; None if it can.

  Args:
    old, new: configurations that differ in FIELDS alone.
    steps: that are saved.
  """
  done = tokens_after(old, steps)
  if new.train.tokens < done:
    return f'{done:,} tokens are trained already'
  # Tokens before each of some steps, the first and the last among them.
  before = sorted(
    {*range(0, steps, max(steps // _POINTS, 1)), max(steps - 1, 0)}
  )
  at = np.array([tokens_after(old, step) for step in before], np.float64)
  same = lambda f: bool(np.array_equal(*jax.device_get([f(old), f(new)])))
  rate = lambda run: schedules.learning_rate(
    run.train.schedule, np.array(before), at, run.train.tokens
  )
  if not same(rate):
    kind = old.train.schedule.kind
    return (
      f"the learning rate of schedule '{kind}' has moved with train.tokens by"
      f" step {steps}; runs that may grow have train.schedule.kind 'constant',"
      " or 'wsd' and a checkpoint before its decay"
    )
  for name in _SWITCHES if old.model.mtp.depth else _SWITCHES[1:]:
    value = lambda run, name=name: getattr(run.train, name).at(
      at, run.train.tokens
    )
    if not same(value):
      return (
        f'train.{name} has switched by step {steps}: deepseek-jax resume'
        ' RUN --tokens=N keeps the token at which it did'
      )
  return None


def extended(config: RunConfig, tokens: float, steps: int) -> RunConfig:
  """Returns the run with another number of tokens.

  Raises:
    InputError: steps that are saved would have been others.
  """
  train, done = config.train, tokens_after(config, steps)
  sized = dataclasses.replace(train, tokens=float(tokens))  # refuses 0 and NaN
  moved = {}
  for name in _SWITCHES:
    switch = getattr(train, name)
    at = switch.until * train.tokens
    # What has switched, or would have in a shorter run, stays where it is.
    if at < done or tokens < train.tokens:
      moved[name] = dataclasses.replace(switch, until=at / tokens)
  out = dataclasses.replace(config, train=dataclasses.replace(sized, **moved))
  why = problem(config, out, steps)
  if why:
    raise InputError(f'train.tokens = {tokens:g}: {why}')
  return out
