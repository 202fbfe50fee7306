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


def anchors(arms: Sequence[str], size: LadderSize) -> dict[str, str]:
  """Returns rung -> the anchor whose rate it has.

  It is the nearest anchor at or below the rung, or else the first; a ladder
  without any of the size's anchors tries the rates on every rung.
  """
  known = [name for name in arms if name in size.anchors] or list(arms)
  out, anchor = {}, known[0]
  for rung in arms:
    anchor = rung if rung in known else anchor
    out[rung] = anchor
  return out


def rate_trials(
  arms: Mapping[str, RunConfig],
  size: LadderSize,
  wanted: Sequence[str] | None = None,
) -> list[Trial]:
  """Returns the runs that choose the rates, anchor by anchor.

  Args:
    arms: rung -> its run, all of the ladder.
    size: of the ladder.
    wanted: rungs whose rates are needed; None: all.
  """
  anchor = anchors(list(arms), size)
  needed = {anchor[rung] for rung in (arms if wanted is None else wanted)}
  return [
    trial(rung, arms[rung], size, rate=rate)
    for rung in arms
    if rung in needed
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
  """Returns the rates of the rungs whose anchor has been tried.

  Args:
    folder: of the ladder.
    arms: rung -> its run, all of the ladder.
    size: of the ladder.
    ended: names of the rates' runs that ended well; those that gave up are
      left out.
  """
  losses: dict[str, list[tuple[float, float]]] = {}
  for made in rate_trials(arms, size):
    if made.name in ended:
      loss = last_loss(folder / made.name, made.until)
      rate = made.config.train.schedule.peak
      losses.setdefault(made.rung, []).append((loss, rate))
  best = {rung: min(each) for rung, each in losses.items()}
  return {
    rung: best[anchor][1]
    for rung, anchor in anchors(list(arms), size).items()
    if anchor in best and best[anchor][0] < np.inf
  }


def hours(flops: float, runs: int, size: LadderSize) -> float:
  """Returns how long runs take on two quiet CPU cores, roughly."""
  return (flops / size.speed + size.overhead * runs) / 3600


def planned(
  arms: Mapping[str, RunConfig], size: LadderSize, wanted: Sequence[str]
) -> tuple[int, float]:
  """Returns how many runs the wanted rungs have, and their FLOPs.

  Whichever rate is best, its run goes on.
  """
  mine = {rung: arms[rung] for rung in wanted}
  rates = dict.fromkeys(arms, size.rates[-1])
  every = rate_trials(arms, size, wanted) + further_trials(mine, size, rates)
  most: dict[str, float] = {}
  for made in every:
    most[made.name] = max(made.flops, most.get(made.name, 0.0))
  return len(most), sum(most.values())
