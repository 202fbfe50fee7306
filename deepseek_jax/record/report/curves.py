"""Lays out curves for a page: paths, ticks and legends, and their numbers.

A chart is numbers and texts; `templates/figures.html.jinja` makes them elements
whose text keeps its size at any width, in the page's colours.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.console import short
from deepseek_jax.record.report import ticks

POINTS = 400  # of a curve; more are averaged
COLORS = 8  # of the page's style; further curves have them again, dashed
_DASHES = ('', '7 3', '2 3', '9 3 2 3', '14 3')
_DOTS = 40  # points of a curve that are shown one by one
WIDE = 9  # ticks of a chart as wide as the page
MARKS = 20  # of values that are not finite, per curve
_SIZE = 1000  # both sides of a chart, in the units of its paths


class Series(NamedTuple):
  """Holds one curve; values may be not finite, which is marked."""

  label: str
  steps: np.ndarray  # [points]
  values: np.ndarray  # [points]


class Panel(NamedTuple):
  """Holds curves that share an axis."""

  title: str
  unit: str
  series: Sequence[Series]


class Curve(NamedTuple):
  """Holds what is drawn of a curve, all of it finite.

  Attributes:
    label: its name.
    steps: [points].
    mean: [points] the line.
    low: [points] where the band begins; `mean` where there is none.
    high: [points] where the band ends.
    last: the last value, as text.
    broken: steps whose value is not finite.
    color: of the page's style by number, or '#rrggbb'; '' takes the next.
  """

  label: str
  steps: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  last: str = ''
  broken: np.ndarray | Sequence[float] = ()
  color: str = ''


class Line(NamedTuple):
  """Holds a curve as paths in a square of 1,000 units.

  Attributes:
    label: its name.
    last: its last value.
    color: of CSS.
    dash: stroke-dasharray of SVG, '' for a line without gaps.
    path: the line.
    dots: a path whose points are shown as dots, '' for none.
    band: the outline of the band, '' for none.
  """

  label: str
  last: str
  color: str
  dash: str
  path: str
  dots: str
  band: str


class Chart(NamedTuple):
  """Holds what the page's template draws of curves that share axes.

  Attributes:
    title: headline of the chart.
    lines: the curves.
    across: ticks of the steps.
    up: ticks of the values.
    marks: places, in units of the paths, where a value was not finite.
    summary: what a reader hears who does not see the chart.
    numbers: what the page's script reads values from.
  """

  title: str
  lines: list[Line]
  across: list[ticks.Tick]
  up: list[ticks.Tick]
  marks: list[float]
  summary: str
  numbers: dict[str, Any]

  @property
  def widest(self) -> str:
    """Returns the longest label beside the vertical axis, which takes room."""
    return max((tick.label for tick in self.up), key=len, default='')


def charts(
  panels: Sequence[Panel], log_x: bool = False, most: int = 5
) -> list[Chart]:
  """Returns a chart for every panel, with at most `most` ticks of steps."""
  return [
    chart(
      f'{panel.title}, {panel.unit}' if panel.unit else panel.title,
      [averaged(series, log_x) for series in panel.series],
      log_x,
      most,
    )
    for panel in panels
  ]


def averaged(series: Series, log_x: bool = False) -> Curve:
  """Returns what is drawn of a series: means of many points, with a band."""
  finite = np.isfinite(series.values)
  keep = finite & (series.steps > 0) if log_x else finite
  parts = binned(series.steps[keep], series.values[keep], log_x)
  last = short(float(series.values[-1]))
  return Curve(series.label, *parts, last, series.steps[~finite][:MARKS])


def binned(
  steps: np.ndarray, values: np.ndarray, log_x: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Averages a curve over at most POINTS bins; as given if it has few points.

  Returns:
    Mean step, mean, least and largest value of each bin that has points.
  """
  if len(steps) <= POINTS:
    return steps, values, values, values
  space = np.geomspace if log_x else np.linspace
  edges = space(steps[0], steps[-1], POINTS + 1)
  bins = np.clip(np.searchsorted(edges, steps, 'right') - 1, 0, POINTS - 1)
  starts = np.flatnonzero(np.diff(bins, prepend=-1))
  counts = np.diff(starts, append=len(bins))
  mean = lambda a: np.add.reduceat(a, starts) / counts
  low = np.minimum.reduceat(values, starts)
  high = np.maximum.reduceat(values, starts)
  return mean(steps), mean(values), low, high


def chart(
  title: str, curves: Sequence[Curve], log_x: bool = False, most: int = 5
) -> Chart:
  """Returns curves on common axes, with at most `most` ticks of steps."""
  steps = np.concatenate([[*c.steps, *c.broken] for c in curves])
  if log_x:
    steps = steps[steps > 0]
  if not len(steps):
    steps = np.ones(1)
  x = ticks.step_axis(steps, log_x)
  y = ticks.value_axis(np.concatenate([[*c.low, *c.high] for c in curves]))
  lines, told = [], []
  for n, curve in enumerate(curves):
    color = curve.color or f'var(--c{n % COLORS})'
    dash = '' if curve.color else _DASHES[n % len(_DASHES)]
    lines.append(_line(curve, x, y, color, dash))
    told.append(_numbers(curve, color))
  broken = {s for c in curves for s in c.broken if not log_x or s > 0}
  return Chart(
    title,
    lines,
    across(steps, most, log_x),
    ticks.ticks(y),
    [_unit(x.place(step)) for step in sorted(broken)],
    _summary(title, curves),
    {'title': title, 'x': x._asdict(), 'y': y._asdict(), 'series': told},
  )


def across(
  steps: np.ndarray, most: int = 5, log: bool = False
) -> list[ticks.Tick]:
  """Returns the ticks of steps; a single step is the only one."""
  axis = ticks.step_axis(steps, log)
  if len({*steps.tolist()}) > 1:
    return ticks.ticks(axis, most, whole=True)
  return [ticks.Tick(50.0, *ticks.labels([float(steps[0])]), False)]


def _unit(share: np.ndarray | float) -> float:
  """Returns a share of an axis in the units of a path."""
  return round(float(share) * _SIZE, 1)


def path(places: np.ndarray, heights: np.ndarray) -> str:
  """Returns the line through points, given as shares of both axes."""
  points = _points(places, heights)
  return f'M{"L".join(points)}' if points else ''


def _points(x: np.ndarray, y: np.ndarray) -> list[str]:
  """Returns points as SVG writes them."""
  return [f'{_unit(a):g} {_unit(1 - b):g}' for a, b in zip(x, y)]


def _line(
  curve: Curve, x: ticks.Axis, y: ticks.Axis, color: str, dash: str
) -> Line:
  """Returns a curve as paths on two axes."""
  places = x.place(curve.steps)
  points = _points(places, y.place(curve.mean))
  band = ''
  if len(points) > 1 and (curve.high > curve.low).any():
    up = _points(places, y.place(curve.high))
    down = _points(places, y.place(curve.low))[::-1]
    band = f'M{"L".join([*up, *down])}Z'
  # A line of no length has round ends, whatever the chart is stretched to.
  few = len(points) < _DOTS
  dots = ''.join(f'M{point}h0' for point in points) if few else ''
  drawn = path(places, y.place(curve.mean))
  return Line(curve.label, curve.last, color, dash, drawn, dots, band)


def _numbers(curve: Curve, color: str) -> dict[str, Any]:
  """Returns a curve for the page's script, to six digits."""
  told = lambda values: [float(f'{v:.6g}') for v in values.tolist()]
  out = {'label': curve.label, 'color': color, 'steps': told(curve.steps)}
  out['mean'] = told(curve.mean)
  if (curve.high > curve.low).any():
    out |= {'low': told(curve.low), 'high': told(curve.high)}
  return out


def _summary(title: str, curves: Sequence[Curve]) -> str:
  """Returns a chart in words: ends, least and most of each curve."""
  parts = []
  for curve in curves[:COLORS]:
    name = f'{curve.label}: ' if curve.label else ''
    if not len(curve.mean):
      parts.append(f'{name}no finite value')
      continue
    first, last = (brief(curve.mean[n]) for n in (0, -1))
    low, high = brief(curve.low.min()), brief(curve.high.max())
    steps = f'steps {brief(curve.steps[0])} to {brief(curve.steps[-1])}'
    parts.append(
      f'{name}{first} to {last} over {steps}, least {low}, most {high}'
    )
  if len(curves) > COLORS:
    parts.append(f'and {len(curves) - COLORS} more curves')
  return f'{title}. {"; ".join(parts)}.'


def brief(value: float) -> str:
  """Returns a number of a summary, to four digits."""
  return f'{float(value):.4g}' if math.isfinite(value) else 'not finite'


def title(name: str) -> str:
  """Returns a scalar's name as a title."""
  text = re.sub('[_/]', ' ', name)
  return text[:1].upper() + text[1:]
