"""Draws the curves of several arms over each other, with bands over seeds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


@curves.drawn
def overlaid(panels: Sequence[tuple[str, Sequence[Band]]]) -> Any:
  """Draws a panel for each metric: the mean of every arm, least to greatest."""
  figure, cells = curves.grid([2.4] * len(panels), 1)
  for cell, (title, bands) in zip(cells, panels):
    axes = figure.add_subplot(cell)
    axes.set_title(title)
    colors = curves.COLORS * (len(bands) // len(curves.COLORS) + 1)
    for band, color in zip(map(smoothed, bands), colors):
      mean = band.values.mean(axis=0)
      label = f'{band.label}  {short(float(mean[-1]))}'
      marker = 'o' if len(mean) < 40 else ''
      axes.plot(
        band.steps, mean, color=color, label=label, linewidth=1.3,
        marker=marker, markersize=2.6,
      )  # fmt: skip
      if len(band.values) > 1:
        low, high = band.values.min(axis=0), band.values.max(axis=0)
        axes.fill_between(
          band.steps, low, high, color=color, alpha=0.16, linewidth=0
        )
    curves.value_axis(axes, np.concatenate([b.values.ravel() for b in bands]))
    curves.step_axis(axes, bins=8)
    axes.set_xlabel('step')
    axes.legend(frameon=False, handlelength=1.2, fontsize=8)
  return figure
