"""Writes the comparison of runs: one HTML file in the style of reports."""

from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.record import comparison
from deepseek_jax.record.report import bands, curves, page

# Drawn where the runs have them, in this order, after the metric compared.
_CURVES = ('loss', 'validation_bits_per_byte', 'grad_norm', 'max_violation')


def figure(
  arms: Sequence[comparison.Arm], metric: str
) -> list[curves.Chart] | None:
  """Returns the curves of arms as charts; None if none has a known metric."""
  panels = []
  for name in dict.fromkeys([metric, *_CURVES]):
    found = []
    for arm in arms:
      seeds = [run.curves[name] for run in arm.runs if name in run.curves]
      band = bands.of_seeds(arm.name, seeds) if seeds else None
      found += [band] if band and len(band.steps) > 1 else []
    if found:
      panels.append((curves.title(name), found))
  return bands.overlaid(panels) if panels else None


def write(
  path: Path, arms: Sequence[comparison.Arm], metric: str, title: str
) -> Path:
  """Writes the page; returns its path."""
  rows = comparison.table(arms, metric)
  return page.write(
    path,
    'compare.html.jinja',
    title=title,
    metric=metric,
    names=list(rows[0]),
    rows=[list(row.values()) for row in rows],
    differences=[
      (d.name, str(d.interval), d.interval.count, d.verdict)
      for d in comparison.differences(arms, metric)
    ],
    first=arms[0].name,
    cautions=comparison.cautions(arms),
    figure=figure(arms, metric),
    runs=[(arm.name, [str(r.path) for r in arm.runs]) for arm in arms],
  )
