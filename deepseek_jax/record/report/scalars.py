"""Builds the report's section on the scalars of a run and runs beside it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.console import short
from deepseek_jax.record import metrics
from deepseek_jax.record.metric import Metric, described
from deepseek_jax.record.report import curves

# First word of a scalar's name -> the curve of the panel that it is.
_SPLITS = {
  'train': 'training',
  'validation': 'validation',
  'val': 'validation',
  'eval': 'validation',
}
# Scalar -> (steps, values).
_Scalars = dict[str, tuple[np.ndarray, np.ndarray]]


class _Found(NamedTuple):
  """Holds a scalar of a run."""

  run: str
  split: str
  steps: np.ndarray
  values: np.ndarray


def scalar_section(
  workdir: Path, beside: Mapping[str, Path]
) -> dict[str, Any] | None:
  """Returns charts of all scalars, and their numbers; None without any.

  Args:
    workdir: folder of the run.
    beside: name -> folder of runs whose curves are laid over.
  """
  own = scalars(workdir), scalars(workdir, 'timings')
  known = described(workdir)
  runs = {_name(workdir, beside): own}
  for name, folder in beside.items():
    runs[name] = scalars(folder), scalars(folder, 'timings')
    known = described(folder) | known
  panels = [
    panel
    for n in (0, 1)
    for panel in _panels({k: run[n] for k, run in runs.items()}, known)
  ]
  if not panels:
    return None
  every = [s.steps for panel in panels for s in panel.series]
  # The first is as wide as the page, the others stand in columns.
  parts = [p for p in ((panels[:1], curves.WIDE), (panels[1:], 5)) if p[0]]
  logs = max(steps.max() for steps in every) >= 10
  return {
    'title': panels[0].title,
    'linear': [curves.charts(part, most=n) for part, n in parts],
    'log': [curves.charts(part, True, n) for part, n in parts] if logs else [],
    'averaged': max(map(len, every)) > curves.POINTS,
    'broken': _broken(own[0]),
    'beside': list(beside),
    'table': [_summary(n, *c) for n, c in (own[0] | own[1]).items()],
  }


def scalars(workdir: Path, name: str = 'metrics') -> _Scalars:
  """Returns a run's scalars, in the order in which their names appeared."""
  points: dict[str, list] = {}
  for row in metrics.read(workdir, name):
    for scalar, value in row.items():
      if scalar != 'step':
        points.setdefault(scalar, []).append((row['step'], value))
  return {
    scalar: (np.array([s for s, _ in p]), np.array([v for _, v in p], float))
    for scalar, p in points.items()
  }


def _name(workdir: Path, beside: Mapping[str, Path]) -> str:
  """Returns what the run's own curves are called; '' if there are no others."""
  if not beside:
    return ''
  name = workdir.resolve().name or 'this run'
  return f'{name} (this run)' if name in beside else name


def _broken(own: _Scalars) -> list[tuple[str, int, int]]:
  """Returns (scalar, first step, count) of values that are not finite."""
  return [
    (name, int(s[~np.isfinite(v)][0]), int((~np.isfinite(v)).sum()))
    for name, (s, v) in own.items()
    if not np.isfinite(v).all()
  ]


def _panels(
  runs: Mapping[str, _Scalars], known: Mapping[str, Metric]
) -> list[curves.Panel]:
  """Returns a panel per scalar, its training and validation curves together."""
  found: dict[str, list[_Found]] = {}
  for run, held in runs.items():
    for name, (steps, values) in held.items():
      first, _, rest = re.sub('[/.]', '_', name).partition('_')
      split, base = 'training', name
      if first in _SPLITS and rest:
        split, base = _SPLITS[first], rest
      found.setdefault(base, []).append(_Found(run, split, steps, values))
  order = [*known, *(name for name in found if name not in known)]
  return [
    _panel(known.get(name, Metric(curves.title(name))), found[name])
    for name in order
    if name in found
  ]


def _panel(known: Metric, found: Sequence[_Found]) -> curves.Panel:
  """Returns the panel of a metric; its title names validation if alone."""
  title, splits = known.title, {f.split for f in found}
  if splits == {'validation'}:
    title = f'Validation {title[:1].lower()}{title[1:]}'
  series = []
  for f in found:
    label = f.run
    if not f.run:
      label = f.split if len(found) > 1 else ''
    elif len(splits) > 1 and f.split == 'validation':
      label = f'{f.run}, validation'
    series.append(curves.Series(label, f.steps, f.values))
  return curves.Panel(title, known.unit, series)


def _summary(name: str, steps: np.ndarray, values: np.ndarray) -> tuple:
  """Returns a row of the table: name, count, first, last and least value."""
  finite = np.isfinite(values)
  best = (
    f'{short(values[finite].min())} at step'
    f' {steps[finite][values[finite].argmin()]}'
    if finite.any()
    else '—'
  )
  return (
    name,
    len(values),
    short(values[0]),
    short(values[-1]),
    best,
  )
