"""Reads what a ladder's runs have reached, and draws the conclusion."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax import files
from deepseek_jax.config import to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.ladder import costs
from deepseek_jax.ladder.rungs import RUNGS
from deepseek_jax.ladder.sizes import LadderSize
from deepseek_jax.ladder.trials import Trial, last_loss, step_flops
from deepseek_jax.record import comparison, reach, results
from deepseek_jax.record.reach import Point
from deepseek_jax.run.config import RunConfig

VALIDATED = 'validation_bits_per_byte'
GAVE_UP = 'gave-up.json'  # in the folder of a run that diverged


def ended(folder: Path, trials: Sequence[Trial]) -> set[str]:
  """Returns the names of the runs that have come as far as they are to go."""
  return {
    trial.name
    for trial in trials
    if any(p.flops >= 0.999 * trial.flops for p in points_of(folder, trial))
  }


def gave_up(folder: Path, trials: Sequence[Trial]) -> set[str]:
  """Returns the names of the runs that diverged for good."""
  return {t.name for t in trials if (folder / t.name / GAVE_UP).exists()}


def points_of(folder: Path, trial: Trial) -> list[Point]:
  """Returns bits per byte at each budget that a run has spent so far."""
  workdir = folder / trial.name
  if not (workdir / 'config.json').exists():
    return []
  curves = comparison.read(workdir).curves
  steps, bits = curves.get(VALIDATED, ((), ()))
  each = step_flops(trial.config)
  return [
    Point(trial.rung, float(step) * each, float(value), trial.config.seed)
    for step, value in zip(steps, bits)
    if int(step) in trial.config.evaluate.at
  ]


def points(
  folder: Path, trials: Sequence[Trial]
) -> tuple[list[Point], tuple[str, ...]]:
  """Returns the points of runs with the chosen rates.

  Returns:
    Those of rungs with a curve, and the rungs that lack one: fewer than two
    budgets were reached, or a loss is not finite.
  """
  found = [p for trial in trials for p in points_of(folder, trial)]
  budgets: dict[str, set[float]] = {trial.rung: set() for trial in trials}
  for point in found:
    if math.isfinite(point.loss):
      budgets[point.arm].add(point.flops)
  lacking = tuple(arm for arm, held in budgets.items() if len(held) < 2)
  good = [p for p in found if math.isfinite(p.loss) and p.arm not in lacking]
  return good, lacking


def _told(rung: str) -> dict[str, Any]:
  """Returns what a rung is; an own arm is its name alone."""
  for known in RUNGS:
    if known.name == rung:
      return {
        'generation': known.generation,
        'idea': known.idea,
        'fields': list(known.fields),
      }
  return {'generation': '', 'idea': '', 'fields': []}


def _rung(
  folder: Path, rung: str, run: RunConfig, tried: Sequence[Trial], rate: float
) -> dict[str, Any]:
  """Returns a rung's plan, and the rates that were tried on it."""
  window = run.data.seq_len
  made = costs.cost(run.model, window, window)
  return {
    **_told(rung),
    'rate': rate,
    'tried': {
      f'{t.config.train.schedule.peak:g}': last_loss(folder / t.name, t.until)
      for t in tried
      if t.rung == rung and points_of(folder, t)
    },
    'plan': made._asdict()
    | {
      'training_bytes': costs.training_bytes(run),
      'update': costs.update_flops(run) / step_flops(run),
    },
  }


def differences(found: Sequence[Point]) -> dict[str, dict]:
  """Returns each rung less the one below at the smallest budget, by seed."""
  out: dict[str, dict] = {}
  first = {}
  for point in found:
    held = first.setdefault(point.arm, {})
    least = held.get(point.seed)
    if least is None or point.flops < least.flops:
      held[point.seed] = point
  arms = list(first)
  for below, arm in itertools.pairwise(arms):
    both = [seed for seed in first[arm] if seed in first[below]]
    each = [first[arm][s].loss - first[below][s].loss for s in both]
    if each:
      out[arm] = {'below': below, **comparison.interval(each)._asdict()}
  return out


def conclusion(
  folder: Path,
  arms: Mapping[str, RunConfig],
  trials: tuple[Sequence[Trial], Sequence[Trial]],
  rates: Mapping[str, float],
  size: LadderSize,
  first: str,
) -> dict[str, Any]:
  """Returns all that a ladder found, as JSON values.

  Args:
    folder: of the ladder.
    arms: rung -> its run.
    trials: those that chose the rates, and those that were run with them.
    rates: the chosen ones.
    size: of the ladder.
    first: the rung whose final loss the others are to reach.

  Raises:
    InputError: too few runs have ended.
  """
  tried, runs = trials
  found, lacking = points(folder, runs)
  lacking += tuple(rung for rung in arms if rung not in rates)
  names = dict.fromkeys(t.name for t in (*tried, *runs))
  done = [r for name in names if (r := results.read(folder / name))]
  if not done or first not in {p.arm for p in found}:
    raise InputError(
      f'{folder}: {first!r}, which the others are compared with, has not yet'
      ' stopped after two budgets; go on with the ladder'
    )
  curves = reach.fit(found)
  reached = {}
  for arm in curves.arms:
    each = reach.reach(curves, arm, first)
    reached[arm] = each._asdict() if each else None
  return {
    'size': to_dict(size),
    'first': first,
    'rungs': {
      rung: _rung(folder, rung, arms[rung], tried, rates[rung])
      for rung in curves.arms
    },
    'points': [point._asdict() for point in found],
    'fit': {
      'scatter': curves.scatter,
      'freedom': curves.freedom,
      'bent': curves.bent,
    },
    'reach': reached,
    'lacking': list(lacking),
    'differences': differences(found),
    'runs': len(done),
    'seconds': sum(r['seconds'] for r in done),
    'data': done[0]['data'] | {'heldout': done[0]['heldout']},
    'versions': done[0]['versions'],
    'machine': done[0]['machine'],
  }


def mark(workdir: Path, why: str) -> None:
  """Notes that a run gave up, so that it is not started again."""
  with files.whole(workdir / GAVE_UP) as scratch:
    scratch.write_text(json.dumps({'why': why}) + '\n')
