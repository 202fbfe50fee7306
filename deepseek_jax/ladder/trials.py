"""Decides which runs a ladder has, and how long each of them is.

FLOPs are the planner's, per token of a window, times tokens: each rung reads
as many whole batches as its budget pays for. At the smallest budget every
learning rate is tried. The best one, by the training loss of the last fifth of
the steps (windows that were not trained on before, and none of the held-out
text that is reported), then makes a run through all budgets, and one for each
further seed. The rate is constant, so a run through all budgets holds the runs
of the smaller ones: it is validated where each ends.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax.config_changes import changed
from deepseek_jax.errors import InputError
from deepseek_jax.ladder.sizes import LadderSize
from deepseek_jax.plan import match as matching
from deepseek_jax.record import metrics
from deepseek_jax.run.config import RunConfig

LAST = 0.2  # share of the steps whose loss chooses the rate


class Trial(NamedTuple):
  """Describes a run of the ladder.

  Attributes:
    name: of its folder.
    rung: whose run it is.
    config: of the run.
    flops: what it spends.
  """

  name: str
  rung: str
  config: RunConfig
  flops: float


def step_flops(run: RunConfig) -> float:
  """Returns the training FLOPs of one step."""
  length = run.data.seq_len
  each = matching.quantity('flops', length)(run.model)
  return each * run.train.batch.size * length


def steps_of(run: RunConfig, budgets: Sequence[float]) -> tuple[int, ...]:
  """Returns after how many steps a run has spent each budget.

  Raises:
    InputError: a budget ends before the warm-up does, or two end together.
  """
  each = step_flops(run)
  steps = tuple(round(flops / each) for flops in budgets)
  least = max(run.train.schedule.warmup, 1)
  if steps[0] < least or len(set(steps)) < len(steps):
    raise InputError(
      f'budgets = {", ".join(f"{b:g}" for b in budgets)}: make'
      f' {", ".join(map(str, steps))} steps of {each:.3g} FLOPs; every budget'
      f' must end later than the one before, and than the warm-up of {least}'
    )
  return steps


def spent(run: RunConfig, budgets: Sequence[float]) -> RunConfig:
  """Returns a run that ends with the last budget, validated at each."""
  steps = steps_of(run, budgets)
  tokens = steps[-1] * run.train.batch.size * run.data.seq_len
  return changed(
    run, {'train.tokens': float(tokens), 'evaluate.at': tuple(steps)}
  )


def _trial(
  rung: str,
  run: RunConfig,
  budgets: Sequence[float],
  rate: float,
  seed: int,
) -> Trial:
  """Returns the run of a rung with a rate and a seed."""
  made = changed(
    spent(run, budgets),
    {
      'train.schedule.peak': rate,
      'seed': run.seed + seed,
      'data.seed': run.data.seed + seed,
    },
  )
  name = f'{rung}-rate={rate:g}-seed={made.seed}-budgets={len(budgets)}'
  return Trial(name, rung, made, made.evaluate.at[-1] * step_flops(run))


def rate_trials(arms: Mapping[str, RunConfig], size: LadderSize) -> list[Trial]:
  """Returns the runs that choose the rates, rung by rung."""
  return [
    _trial(rung, run, size.budgets[:1], rate, 0)
    for rung, run in arms.items()
    for rate in size.rates
  ]


def further_trials(
  arms: Mapping[str, RunConfig], size: LadderSize, rates: Mapping[str, float]
) -> list[Trial]:
  """Returns the runs with the chosen rates: through all budgets, then seeds."""
  long = [
    _trial(rung, run, size.budgets, rates[rung], 0)
    for rung, run in arms.items()
    if rung in rates
  ]
  seeds = [
    _trial(rung, run, size.budgets[:1], rates[rung], seed)
    for rung, run in arms.items()
    if rung in rates
    for seed in range(1, size.seeds)
  ]
  return long + seeds


def last_loss(workdir: Path) -> float:
  """Returns the mean training loss of a run's last steps; inf without any."""
  losses = [row['loss'] for row in metrics.read(workdir) if 'loss' in row]
  last = losses[-max(round(LAST * len(losses)), 1) :]
  mean = float(np.mean(last)) if last else np.inf
  return mean if np.isfinite(mean) else np.inf


def best_rates(
  folder: Path, trials: Sequence[Trial], ended: set[str]
) -> dict[str, float]:
  """Returns the rate of each rung whose trials have all ended.

  Args:
    folder: of the ladder.
    trials: those of `rate_trials`.
    ended: names of the runs that ended well; others that gave up are left out.

  Raises:
    InputError: no rate of a rung trains.
  """
  out = {}
  for rung in dict.fromkeys(trial.rung for trial in trials):
    mine = [trial for trial in trials if trial.rung == rung]
    losses = {
      trial.config.train.schedule.peak: last_loss(folder / trial.name)
      for trial in mine
      if trial.name in ended
    }
    best = min(losses, key=losses.__getitem__, default=None)
    if best is None or losses[best] == np.inf:
      raise InputError(
        f'{rung}: no learning rate of {sorted(losses) or "any"} trains it;'
        ' give lower ones'
      )
    out[rung] = best
  return out


def hours(trials: Sequence[Trial], size: LadderSize) -> float:
  """Returns how long runs take on two quiet CPU cores, roughly."""
  flops = sum(trial.flops for trial in trials)
  return (flops / size.speed + size.overhead * len(trials)) / 3600


def planned_hours(
  arms: Mapping[str, RunConfig], size: LadderSize
) -> tuple[int, float]:
  """Returns how many runs a whole ladder has, and the hours of all of them."""
  rates = dict.fromkeys(arms, size.rates[-1])
  every = rate_trials(arms, size) + further_trials(arms, size, rates)
  return len(every), hours(every, size)
