"""Lays the curves of several arms over each other, with bands over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.console import short
from deepseek_jax.record.report import curves


class Band(NamedTuple):
  """Holds the curves of an arm: a row for each seed."""

  label: str
  steps: np.ndarray  # [points]
  values: np.ndarray  # [seeds, points]


def of_seeds(
  label: str, seeds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Band | None:
  """Returns the band of an arm at the steps that all of its seeds have."""
  by_step = [dict(zip(steps.tolist(), values)) for steps, values in seeds]
  common = sorted(set.intersection(*map(set, by_step))) if by_step else []
  if not common:
    return None
  rows = [[seed[step] for step in common] for seed in by_step]
  return Band(label, np.array(common), np.array(rows, np.float64))


def smoothed(band: Band, points: int = curves.POINTS) -> Band:
  """Returns a band averaged over equal spans, if it has more points."""
  n = len(band.steps)
  if n <= points:
    return band
  cuts = np.unique(np.linspace(0, n, points + 1).astype(int))
  counts = np.diff(cuts)
  mean = lambda a: np.add.reduceat(a, cuts[:-1], axis=-1) / counts
  return Band(band.label, mean(band.steps.astype(float)), mean(band.values))


def curve(band: Band) -> curves.Curve:
  """Returns the mean over seeds, with a band from the least to the greatest.

  Points at which a seed is not finite are marked.
  """
  drawn = smoothed(band)
  finite = np.isfinite(drawn.values).all(axis=0)
  kept = drawn.values[:, finite]
  return curves.Curve(
    band.label,
    drawn.steps[finite],
    kept.mean(axis=0),
    kept.min(axis=0),
    kept.max(axis=0),
    short(float(band.values[:, -1].mean())),
    drawn.steps[~finite][: curves.MARKS],
  )


def overlaid(
  panels: Sequence[tuple[str, Sequence[Band]]],
) -> list[curves.Chart]:
  """Returns a chart for each metric: the mean of every arm, and its band."""
  return [
    curves.chart(title, [curve(band) for band in bands], most=curves.WIDE)
    for title, bands in panels
  ]
