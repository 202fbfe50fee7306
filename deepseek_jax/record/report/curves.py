"""Draws figures of a run as inline SVG: text stays text, heatmaps small pixels.

A drawing function gives an SVG element for an HTML page that names no other
file. Matplotlib is imported on the first call and needs no window.
"""

import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.console import short

COLORS = ('#2f6db5', '#c4512d', '#3a8f6b', '#8a5aa8', '#a67c1a', '#5b6470')
INCHES = 10.0  # the page's width, 960 px
POINTS = 400  # of a curve; more are averaged
_MARKS = 20  # of values that are not finite, per curve
_STYLE = {
  'svg.fonttype': 'none',
  'svg.hashsalt': 'deepseek_jax',  # the same numbers give the same bytes
  'font.size': 9,
  'axes.titlesize': 9.5,
  'axes.titlelocation': 'left',
  'axes.labelcolor': '#565c66',
  'axes.edgecolor': '#9aa0a8',
  'axes.linewidth': 0.7,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'grid.color': '#e7e9ec',
  'grid.linewidth': 0.7,
  'text.color': '#26292e',
  'text.parse_math': False,  # a $ in a scalar's name is a $
  'xtick.color': '#9aa0a8',
  'ytick.color': '#9aa0a8',
  'xtick.labelcolor': '#565c66',
  'ytick.labelcolor': '#565c66',
  'savefig.dpi': 'figure',
}


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


def drawn(draw: Callable) -> Callable[..., str]:
  """Calls a function that returns a Figure in our style; returns its SVG."""

  @functools.wraps(draw)
  def wrapper(*args: Any, **kwargs: Any) -> str:
    from matplotlib import style

    # Whatever style a notebook has set stays outside.
    with style.context(_STYLE, after_reset=True):
      return _svg(draw(*args, **kwargs))

  return wrapper


@drawn
def curves(panels: Sequence[Panel], log_x: bool = False) -> str:
  """Draws one panel across the page, or several in rows of three."""
  columns = 3 if len(panels) > 1 else 1
  rows = math.ceil(len(panels) / columns)
  figure, cells = grid([1.5 if columns > 1 else 2.6] * rows, columns)
  for cell, panel in zip(cells, panels):
    axes = figure.add_subplot(cell)
    _draw_panel(axes, panel, log_x)
    axes.set_xlabel('step')
  return figure


def grid(
  rows: Sequence[float],
  columns: int,
  gaps: tuple[float, float] = (0.62, 0.74),
  bar: bool = False,
) -> tuple[Any, Any]:
  """Returns a figure as wide as the page and its grid.

  Margins are stated, not fitted: all figures align, and drawing is fast.

  Args:
    rows: height of each row, in inches.
    columns: how many.
    gaps: between columns and between rows, in inches.
    bar: leaves room for a colour bar in the right margin.
  """
  from matplotlib.figure import Figure

  left, right, top, bottom = 0.72, 0.85 if bar else 0.1, 0.28, 0.46
  height = top + sum(rows) + gaps[1] * (len(rows) - 1) + bottom
  width = (INCHES - left - right - gaps[0] * (columns - 1)) / columns
  figure = Figure((INCHES, height))
  grid = figure.add_gridspec(
    len(rows),
    columns,
    left=left / INCHES,
    right=1 - right / INCHES,
    bottom=bottom / height,
    top=1 - top / height,
    wspace=gaps[0] / width,
    hspace=gaps[1] * len(rows) / sum(rows),
    height_ratios=rows,
  )
  return figure, grid


def ticker() -> Any:
  """Returns the module matplotlib.ticker."""
  from matplotlib import ticker

  return ticker


def colormap(name: str) -> Any:
  """Returns one of matplotlib's colour maps."""
  from matplotlib import colormaps

  return colormaps[name]


def value_axis(axes: Any, values: np.ndarray) -> None:
  """Makes the axis linear, or logarithmic where its values span too much."""
  axes.grid(axis='y')
  axes.yaxis.set_major_locator(
    ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
  )
  axes.yaxis.set_major_formatter(ticker().FuncFormatter(brief))
  values = values[np.isfinite(values)]
  # A range that a linear axis would flatten, such as a gradient's norm.
  wide = values.size and values.max() > 30 * np.median(values)
  if wide and values.min() > 0:
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(ticker().FuncFormatter(brief))


def step_axis(axes: Any, bins: int = 5) -> None:
  """Sets at most `bins` whole steps as ticks; a single step is the only one."""
  steps = {'integer': True, 'min_n_ticks': 1, 'steps': [1, 2, 5, 10]}
  axes.margins(x=0.02)
  axes.xaxis.set_major_locator(ticker().MaxNLocator(bins, **steps))
  axes.xaxis.set_major_formatter(ticker().FuncFormatter(brief))


def brief(value: float, _=None) -> str:
  """Formats a number beside a tick."""
  for unit, size in (('M', 1e6), ('k', 1e3)):
    if abs(value) >= size:
      return f'{value / size:.4g}{unit}'
  return f'{value:.4g}'


def _draw_panel(axes: Any, panel: Panel, log_x: bool) -> None:
  """Draws a panel's curves, and their last values in its title or legend."""
  lines = [
    _draw_series(axes, series, color, log_x)
    for series, color in zip(panel.series, COLORS * len(panel.series))
  ]
  title = f'{panel.title}, {panel.unit}' if panel.unit else panel.title
  axes.set_title(title if len(title) <= 30 else title[:29] + '…')
  value_axis(axes, np.concatenate([s.values for s in panel.series]))
  step_axis(axes)
  if log_x:
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter(ticker().FuncFormatter(brief))
    axes.xaxis.set_minor_formatter(ticker().NullFormatter())
  lasts = [short(float(series.values[-1])) for series in panel.series]
  if len(lasts) == 1:
    axes.set_title(lasts[0], loc='right', color=COLORS[0])
    return
  names = [f'{s.label} {last}' for s, last in zip(panel.series, lasts)]
  legend = axes.legend(lines, names, frameon=False, handlelength=1.2)
  for text, color in zip(legend.get_texts(), COLORS * len(names)):
    text.set_color(color)


def _draw_series(axes: Any, series: Series, color: str, log_x: bool) -> Any:
  """Draws one curve and where it is not finite; returns its line."""
  finite = np.isfinite(series.values)
  keep = finite & (series.steps > 0) if log_x else finite
  x, mean, low, high = _binned(series.steps[keep], series.values[keep], log_x)
  marker = 'o' if len(x) < 40 else ''
  style = {'color': color, 'linewidth': 1.3, 'markersize': 2.6}
  (line,) = axes.plot(x, mean, marker=marker, **style)
  if len(x) < keep.sum():
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
  for step in series.steps[~finite][:_MARKS]:
    axes.axvline(step, color='#b3261e', linewidth=0.8, linestyle=':')
  return line


def _binned(
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


def title(name: str) -> str:
  """Returns a scalar's name as a title."""
  text = re.sub('[_/]', ' ', name)
  return text[:1].upper() + text[1:]


def _svg(figure: Any) -> str:
  """Returns the figure as one element, its ids unlike any other figure's."""
  file = io.StringIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  svg = file.getvalue()
  svg = svg[svg.index('<svg') :].strip()
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'<style .*?</style>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
  svg = svg.replace('xlink:href', 'href')
  mark = 'f' + hashlib.sha256(svg.encode()).hexdigest()[:8]
  svg = re.sub(r'( id="| href="#|url\(#)', rf'\g<1>{mark}-', svg)
  # Hundredths of a point are enough for a path.
  rounded = lambda match: re.sub(r'(\.\d\d)\d+', r'\1', match[0])
  return re.sub(r' d="[^"]*"', rounded, svg)
