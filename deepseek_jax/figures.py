"""Figures of a run as inline SVG: text stays text, heatmaps are small pixels.

Each function gives SVG elements for an HTML page that name no other file.
Matplotlib is imported on the first call and needs no window.
Legend: N intervals, L MoE layers, E experts.
"""

import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.metrics import short

INK = '#26292e'
COLORS = ('#2f6db5', '#c4512d', '#3a8f6b', '#8a5aa8', '#a67c1a', '#5b6470')
_INCHES = 10.0  # the page's width, 960 px
_COLUMNS = 4  # small multiples in a row
_ROWS = 6  # rows in one figure, so that a printed page holds it
_CELLS = 160  # columns of a heatmap over time
POINTS = 400  # of a curve; more are averaged
_MARKS = 20  # of values that are not finite, per curve
_FINE = 16  # layers; of more, pictures are coarser, or the file grows
_VECTOR_POINTS = 40_000  # lines with more points in all become pixels
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
  'text.color': INK,
  'text.parse_math': False,  # a $ in a scalar's name is a $
  'xtick.color': '#9aa0a8',
  'ytick.color': '#9aa0a8',
  'xtick.labelcolor': '#565c66',
  'ytick.labelcolor': '#565c66',
  'savefig.dpi': 'figure',
}


class Series(NamedTuple):
  """One curve; values may be not finite, which is marked."""

  label: str
  steps: np.ndarray  # [points]
  values: np.ndarray  # [points]


class Panel(NamedTuple):
  """Curves that share an axis."""

  title: str
  unit: str
  series: Sequence[Series]


def _drawn(draw: Callable) -> Callable[..., str]:
  """Calls a function that returns a Figure in our style; gives its SVG."""

  @functools.wraps(draw)
  def wrapper(*args, **kwargs) -> str:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
      return _svg(draw(*args, **kwargs))

  return wrapper


@_drawn
def curves(panels: Sequence[Panel], log_x: bool = False) -> str:
  """One panel across the page, or several in rows of three."""
  columns = 3 if len(panels) > 1 else 1
  rows = math.ceil(len(panels) / columns)
  figure, grid = _grid([1.5 if columns > 1 else 2.6] * rows, columns)
  for cell, panel in zip(grid, panels):
    axes = figure.add_subplot(cell)
    _draw_panel(axes, panel, log_x)
    axes.set_xlabel('step')
  return figure


@_drawn
def load_by_layer(share: np.ndarray, layers: Sequence[int]) -> str:
  """Heatmap of one interval: share [L E] in units of an even share."""
  L, E = share.shape
  figure, grid = _grid([float(np.clip(0.23 * L, 1, 5.5))], 1, bar=True)
  axes = figure.add_subplot(grid[0])
  image = axes.imshow(share, **_heat(), extent=(-0.5, E - 0.5, L - 0.5, -0.5))
  shown = range(0, L, math.ceil(L / 16))
  axes.set_yticks(list(shown), [str(layers[n]) for n in shown])
  axes.xaxis.set_major_locator(_ticker().MaxNLocator(16, integer=True))
  axes.set(xlabel='expert', ylabel='layer')
  _load_bar(figure, grid, image)
  return figure


def load_over_time(
  share: np.ndarray, edges: np.ndarray, layers: Sequence[int]
) -> list[str]:
  """Heatmaps of each layer: share [N L E], edges [N + 1] in steps."""
  pick = sample(edges, _CELLS if len(layers) <= _FINE else _CELLS // 4)

  def heat(axes, n):
    extent = (edges[0], edges[-1], share.shape[2] - 0.5, -0.5)
    return axes.imshow(share[pick, n].T, **_heat(), extent=extent)

  return _multiples(layers, 'expert', heat, bar=True)


def lines_over_time(
  values: np.ndarray, steps: np.ndarray, layers: Sequence[int], name: str
) -> list[str]:
  """A line per expert in a panel per layer: values [N L E], steps [N]."""
  finite = values[np.isfinite(values)]
  low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
  pad = 0.04 * (high - low) or 1e-3

  def lines(axes, n):
    # Experts in the order of their last value, so that the hue reads as rank.
    order = np.argsort(values[-1, n])
    hues = _colormap('viridis')(np.linspace(0.05, 0.9, len(order)))
    for expert, hue in zip(order, hues):
      axes.plot(
        steps,
        values[:, n, expert],
        color=hue,
        linewidth=0.7,
        marker='.' if len(steps) == 1 else '',
        rasterized=values.size > _VECTOR_POINTS,
      )
    axes.set_ylim(low - pad, high + pad)
    axes.grid(axis='y')
    axes.yaxis.set_major_formatter(_ticker().FuncFormatter(_brief))

  return _multiples(layers, name, lines)


@_drawn
def layer_curves(
  panels: dict[str, np.ndarray], steps: np.ndarray, layers: Sequence[int]
) -> str:
  """Panels with one line a layer: name -> [N L] or [N 1]; hue is the layer."""
  columns = min(len(panels), 3)
  rows = math.ceil(len(panels) / columns)
  figure, grid = _grid([1.5] * rows, columns, bar=len(layers) > 1)
  cells = grid.subplots(squeeze=False)
  hues = _colormap('viridis')(np.linspace(0, 0.9, len(layers)))
  for axes, (name, values) in zip(cells.flat, panels.items()):
    for line, hue in zip(values.T, hues):
      marker = 'o' if len(steps) == 1 else ''
      axes.plot(steps, line, color=hue, marker=marker, markersize=3)
    axes.set_title(name)
    _value_axis(axes, values)
    _step_axis(axes)
    axes.set_xlabel('step')
  for axes in cells.flat[len(panels) :]:
    axes.set_axis_off()
  if len(layers) > 1:
    _layer_bar(figure, grid, layers)
  return figure


def sample(edges: np.ndarray, cells: int) -> np.ndarray:
  """Which interval lies under the centre of each of equally wide cells.

  Args:
    edges: [N + 1] steps at which intervals begin and end.
    cells: number of cells from the first edge to the last.

  Returns:
    [cells] int64.
  """
  centres = np.linspace(edges[0], edges[-1], 2 * cells + 1)[1::2]
  found = np.searchsorted(edges, centres, side='left') - 1
  return np.clip(found, 0, len(edges) - 2)


def _grid(
  rows: Sequence[float],
  columns: int,
  gaps: tuple[float, float] = (0.62, 0.74),
  bar: bool = False,
):
  """A figure as wide as the page and its grid; rows and gaps in inches.

  Margins are stated, not fitted: all figures align, and drawing is fast.
  """
  from matplotlib.figure import Figure

  left, right, top, bottom = 0.72, 0.85 if bar else 0.1, 0.28, 0.46
  height = top + sum(rows) + gaps[1] * (len(rows) - 1) + bottom
  width = (_INCHES - left - right - gaps[0] * (columns - 1)) / columns
  figure = Figure((_INCHES, height))
  grid = figure.add_gridspec(
    len(rows),
    columns,
    left=left / _INCHES,
    right=1 - right / _INCHES,
    bottom=bottom / height,
    top=1 - top / height,
    wspace=gaps[0] / width,
    hspace=gaps[1] * len(rows) / sum(rows),
    height_ratios=rows,
  )
  return figure, grid


def _bar_axes(figure, grid):
  """Room for a colour bar in the right margin of the grid."""
  bottom, top = grid.bottom, grid.top
  return figure.add_axes(
    (1 - 0.72 / _INCHES, bottom, 0.11 / _INCHES, top - bottom)
  )


def _ticker():
  from matplotlib import ticker

  return ticker


def _colormap(name: str):
  from matplotlib import colormaps

  return colormaps[name]


def _heat() -> dict:
  # One scale in every report: dark is idle, bright is twice an even share.
  # 'none' embeds one pixel per cell, which the browser enlarges.
  return {
    'cmap': 'viridis',
    'vmin': 0,
    'vmax': 2,
    'aspect': 'auto',
    'interpolation': 'none',
  }


def _load_bar(figure, grid, image):
  bar = figure.colorbar(
    image,
    cax=_bar_axes(figure, grid),
    extend='max',
    extendfrac=0.04,
    ticks=[0, 0.5, 1, 1.5, 2],
  )
  bar.set_label('load / even share')
  bar.outline.set_visible(False)


def _layer_bar(figure, grid, layers: Sequence[int]):
  from matplotlib import cm, colors

  hues = colors.ListedColormap(
    _colormap('viridis')(np.linspace(0, 0.9, len(layers)))
  )
  norm = colors.BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
  bar = figure.colorbar(
    cm.ScalarMappable(norm, hues), cax=_bar_axes(figure, grid)
  )
  shown = range(0, len(layers), math.ceil(len(layers) / 12))
  bar.set_ticks(list(shown), labels=[str(layers[n]) for n in shown])
  bar.set_label('layer')
  bar.ax.minorticks_off()
  bar.outline.set_visible(False)


def _multiples(layers, name: str, draw: Callable, bar=False) -> list[str]:
  """A panel per layer, in figures of a few rows."""
  chunk = _COLUMNS * _ROWS
  starts = range(0, len(layers), chunk)
  picks = [range(s, min(s + chunk, len(layers))) for s in starts]
  return [_multiple(pick, layers, name, draw, bar) for pick in picks]


@_drawn
def _multiple(pick: range, layers, name: str, draw: Callable, bar: bool):
  columns = min(len(pick), _COLUMNS)
  rows = math.ceil(len(pick) / columns)
  figure, grid = _grid([1.25] * rows, columns, (0.3, 0.34), bar)
  figure.set_dpi(200 if len(layers) <= _FINE else 110)
  cells = grid.subplots(squeeze=False, sharex=True, sharey=True)
  for axes, n in zip(cells.flat, pick):
    image = draw(axes, n)
    axes.set_title(f'layer {layers[n]}')
    _step_axis(axes, bins=4)
  for axes in cells.flat[len(pick) :]:
    axes.set_axis_off()
  for axes in cells[-1]:
    axes.set_xlabel('step')
  figure.supylabel(name, x=0.008, fontsize=9, color='#565c66')
  if bar:
    _load_bar(figure, grid, image)
  return figure


def _value_axis(axes, values: np.ndarray):
  axes.grid(axis='y')
  axes.yaxis.set_major_locator(
    _ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
  )
  axes.yaxis.set_major_formatter(_ticker().FuncFormatter(_brief))
  values = values[np.isfinite(values)]
  # A range that a linear axis would flatten, such as a gradient's norm.
  wide = values.size and values.max() > 30 * np.median(values)
  if wide and values.min() > 0:
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(_ticker().FuncFormatter(_brief))


def _step_axis(axes, bins: int = 5):
  ticker = _ticker()
  axes.margins(x=0.02)
  axes.xaxis.set_major_locator(
    ticker.MaxNLocator(4, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
  )
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(_brief))


def _brief(value: float, _=None) -> str:
  for unit, size in (('M', 1e6), ('k', 1e3)):
    if abs(value) >= size:
      return f'{value / size:.4g}{unit}'
  return f'{value:.4g}'


def _draw_panel(axes, panel: Panel, log_x: bool):
  lines = [
    _draw_series(axes, series, color, log_x)
    for series, color in zip(panel.series, COLORS * len(panel.series))
  ]
  title = f'{panel.title}, {panel.unit}' if panel.unit else panel.title
  axes.set_title(title if len(title) <= 30 else title[:29] + '…')
  _value_axis(axes, np.concatenate([s.values for s in panel.series]))
  _step_axis(axes)
  if log_x:
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(_brief))
    axes.xaxis.set_minor_formatter(_ticker().NullFormatter())
  lasts = [short(float(series.values[-1])) for series in panel.series]
  if len(lasts) == 1:
    axes.set_title(lasts[0], loc='right', color=COLORS[0])
    return
  names = [f'{s.label} {last}' for s, last in zip(panel.series, lasts)]
  legend = axes.legend(lines, names, frameon=False, handlelength=1.2)
  for text, color in zip(legend.get_texts(), COLORS * len(names)):
    text.set_color(color)


def _draw_series(axes, series: Series, color: str, log_x: bool):
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


def _binned(steps: np.ndarray, values: np.ndarray, log_x: bool):
  """Means and extremes over at most POINTS bins; as given if few."""
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


def _svg(figure) -> str:
  """The figure as one element, its ids unlike those of any other figure."""
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
  short = lambda match: re.sub(r'(\.\d\d)\d+', r'\1', match[0])
  return re.sub(r' d="[^"]*"', short, svg)
