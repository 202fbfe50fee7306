"""Decides which runs a ladder has, and how long each of them is.

FLOPs are the planner's, per token of a window, times tokens: each rung reads
as many whole batches as its budget pays for. At the smallest budget every
learning rate is tried on the anchors. The best one, by the training loss of the
last fifth of the steps (windows that were not trained on before, and none of
the held-out text that is reported), goes on through all budgets; further seeds
stop after the smallest. The rate is constant, so a run holds the shorter ones:
it is validated where each budget ends.
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
  """Describes a run of the ladder, as far as it is to go.

  Attributes:
    name: of its folder.
    rung: whose run it is.
    config: of the run, through all budgets.
    until: steps after which it stops for now.
    flops: what it has spent by then.
  """

  name: str
  rung: str
  config: RunConfig
  until: int
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


def trial(
  rung: str,
  run: RunConfig,
  size: LadderSize,
  *,
  rate: float,
  seed: int = 0,
  budgets: int = 1,
) -> Trial:
  """Returns the run of a rung with a rate and a seed, for some budgets."""
  made = changed(
    spent(run, size.budgets),
    {
      'train.schedule.peak': rate,
      'seed': run.seed + seed,
      'data.seed': run.data.seed + seed,
    },
  )
  until = made.evaluate.at[budgets - 1]
  name = f'{rung}-rate={rate:g}-seed={made.seed}'
  return Trial(name, rung, made, until, until * step_flops(run))


def anchors(arms: Mapping[str, RunConfig], size: LadderSize) -> tuple[str, ...]:
  """Returns the rungs on which rates are tried; all if there are no others."""
  return tuple(n for n in arms if n in size.anchors) or tuple(arms)


def rate_trials(arms: Mapping[str, RunConfig], size: LadderSize) -> list[Trial]:
  """Returns the runs that choose the rates, anchor by anchor."""
  return [
    trial(rung, arms[rung], size, rate=rate)
    for rung in anchors(arms, size)
    for rate in size.rates
  ]


def further_trials(
  arms: Mapping[str, RunConfig],
  size: LadderSize,
  rates: Mapping[str, float],
  budgets: int | None = None,
) -> list[Trial]:
  """Returns the runs with the chosen rates, rung by rung.

  Args:
    arms: rung -> its run.
    size: of the ladder.
    rates: rung -> its rate.
    budgets: how many of them the first seed spends; None: all.
  """
  most = budgets or len(size.budgets)
  return [
    trial(
      rung,
      run,
      size,
      rate=rates[rung],
      seed=seed,
      budgets=1 if seed else most,
    )
    for rung, run in arms.items()
    for seed in range(size.seeds)
  ]


def last_loss(workdir: Path, steps: int) -> float:
  """Returns the mean training loss of the last of some steps.

  Without any, or with one that is not finite, it is inf.
  """
  losses = [
    row['loss']
    for row in metrics.read(workdir)
    if 'loss' in row and row['step'] <= steps
  ]
  last = losses[-max(round(LAST * len(losses)), 1) :]
  mean = float(np.mean(last)) if last else np.inf
  return mean if np.isfinite(mean) else np.inf


def best_rates(
  folder: Path,
  arms: Mapping[str, RunConfig],
  size: LadderSize,
  ended: set[str],
) -> dict[str, float]:
  """Returns the rate of each rung: of its anchor, whose trials have ended.

  Args:
    folder: of the ladder.
    arms: rung -> its run.
    size: of the ladder.
    ended: names of the rates' runs that ended well; those that gave up are
      left out.

  Raises:
    InputError: no rate has trained an anchor.
  """
  chosen: dict[str, tuple[float, float]] = {}
  for made in rate_trials(arms, size):
    if made.name in ended:
      loss = last_loss(folder / made.name, made.until)
      rate = made.config.train.schedule.peak
      chosen[made.rung] = min(
        chosen.get(made.rung, (np.inf, rate)), (loss, rate)
      )
  out: dict[str, float] = {}
  known = anchors(arms, size)
  anchor = known[0]
  for rung in arms:
    anchor = rung if rung in known else anchor
    loss, rate = chosen.get(anchor, (np.inf, 0.0))
    if loss == np.inf:
      raise InputError(
        f'{anchor}: no run with a learning rate of'
        f' {", ".join(f"{r:g}" for r in size.rates)} has spent the smallest'
        ' budget; go on with the ladder, or give lower rates if all gave up'
      )
    out[rung] = rate
  return out


def hours(flops: float, runs: int, size: LadderSize) -> float:
  """Returns how long runs take on two quiet CPU cores, roughly."""
  return (flops / size.speed + size.overhead * runs) / 3600


def planned(
  arms: Mapping[str, RunConfig], size: LadderSize
) -> tuple[int, float]:
  """Returns how many runs a whole ladder has, and their FLOPs.

  Whichever rate is best, its run goes on.
  """
  rates = dict.fromkeys(arms, size.rates[-1])
  every = rate_trials(arms, size) + further_trials(arms, size, rates)
  most: dict[str, float] = {}
  for made in every:
    most[made.name] = max(made.flops, most.get(made.name, 0.0))
  return len(most), sum(most.values())
