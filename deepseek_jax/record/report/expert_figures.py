"""Draws figures of the experts: load, bias and balance, by layer and over time.

`figure`, `grid` and `axes` are matplotlib's, which is imported when drawing.
Legend: N intervals, L MoE layers, E experts, G groups of neighbouring experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deepseek_jax.record.report import curves as figures

_COLUMNS = 4  # small multiples in a row
_ROWS = 6  # rows in one figure, so that a printed page holds it
_CELLS = 160  # columns of a heatmap over time
_FINE = 16  # layers; of more, pictures are coarser, or the file grows
_SHARE = 'load / even share'
_VECTOR_POINTS = 40_000  # lines with more points in all become pixels


@figures.drawn
def load_by_layer(share: np.ndarray, layers: Sequence[int]) -> str:
  """Draws a heatmap of one interval: share [L E] in units of an even share."""
  L, E = share.shape
  figure, grid = figures.grid([float(np.clip(0.23 * L, 1, 5.5))], 1, bar=True)
  axes = figure.add_subplot(grid[0])
  image = axes.imshow(share, **_heat(), extent=(-0.5, E - 0.5, L - 0.5, -0.5))
  shown = range(0, L, math.ceil(L / 16))
  axes.set_yticks(list(shown), [str(layers[n]) for n in shown])
  axes.xaxis.set_major_locator(figures.ticker().MaxNLocator(16, integer=True))
  axes.set(xlabel='expert', ylabel='layer')
  _load_bar(figure, grid, image, _SHARE)
  return figure


def load_over_time(
  share: np.ndarray, edges: np.ndarray, layers: Sequence[int]
) -> list[str]:
  """Draws heatmaps of each layer: share [N L E], edges [N + 1] in steps."""
  pick = sample(edges, _CELLS if len(layers) <= _FINE else _CELLS // 4)

  def heat(axes: Any, n: int) -> Any:
    extent = (edges[0], edges[-1], share.shape[2] - 0.5, -0.5)
    return axes.imshow(share[pick, n].T, **_heat(), extent=extent)

  return _multiples(layers, 'expert', heat, bar=_SHARE)


def lines_over_time(
  values: np.ndarray, steps: np.ndarray, layers: Sequence[int], name: str
) -> list[str]:
  """Draws a line per expert in a panel per layer: values [N L E], steps [N]."""
  finite = values[np.isfinite(values)]
  low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
  pad = 0.04 * (high - low) or 1e-3

  def lines(axes: Any, n: int) -> None:
    # Experts in the order of their last value, so that the hue reads as rank.
    order = np.argsort(values[-1, n])
    hues = figures.colormap('viridis')(np.linspace(0.05, 0.9, len(order)))
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
    axes.yaxis.set_major_formatter(
      figures.ticker().FuncFormatter(figures.brief)
    )

  return _multiples(layers, name, lines)


def chosen_together(lift: np.ndarray, layers: Sequence[int]) -> list[str]:
  """Draws a heatmap per layer: lift [L G G], 1 where pairs are as by chance."""
  G = lift.shape[-1]

  def heat(axes: Any, n: int) -> Any:
    extent = (-0.5, G - 0.5, G - 0.5, -0.5)
    return axes.imshow(lift[n], **_heat(), extent=extent)

  label = 'pairs / by chance'
  return _multiples(layers, 'expert', heat, bar=label, across='expert')


@figures.drawn
def layer_curves(
  panels: dict[str, np.ndarray], steps: np.ndarray, layers: Sequence[int]
) -> str:
  """Draws panels with a line per layer, whose hue is the layer: [N L] or [N 1].

  Args:
    panels: name -> values.
    steps: [N].
    layers: [L] numbers of the layers.
  """
  columns = min(len(panels), 3)
  rows = math.ceil(len(panels) / columns)
  figure, grid = figures.grid([1.5] * rows, columns, bar=len(layers) > 1)
  cells = grid.subplots(squeeze=False)
  hues = figures.colormap('viridis')(np.linspace(0, 0.9, len(layers)))
  for axes, (name, values) in zip(cells.flat, panels.items()):
    for line, hue in zip(values.T, hues):
      marker = 'o' if len(steps) == 1 else ''
      axes.plot(steps, line, color=hue, marker=marker, markersize=3)
    axes.set_title(name)
    figures.value_axis(axes, values)
    figures.step_axis(axes)
    axes.set_xlabel('step')
  for axes in cells.flat[len(panels) :]:
    axes.set_axis_off()
  if len(layers) > 1:
    _layer_bar(figure, grid, layers)
  return figure


def sample(edges: np.ndarray, cells: int) -> np.ndarray:
  """Returns which interval lies under the centre of each of equally wide cells.

  Args:
    edges: [N + 1] steps at which intervals begin and end.
    cells: number of cells from the first edge to the last.

  Returns:
    [cells] int64.
  """
  centres = np.linspace(edges[0], edges[-1], 2 * cells + 1)[1::2]
  found = np.searchsorted(edges, centres, side='left') - 1
  return np.clip(found, 0, len(edges) - 2)


def _heat() -> dict:
  """Returns the arguments of imshow that all heatmaps share."""
  # One scale in every report: dark is idle, bright is twice an even share.
  # 'none' embeds one pixel per cell, which the browser enlarges.
  return {
    'cmap': 'viridis',
    'vmin': 0,
    'vmax': 2,
    'aspect': 'auto',
    'interpolation': 'none',
  }


def _load_bar(figure: Any, grid: Any, image: Any, label: str) -> None:
  """Draws the colour bar of `_heat` in the right margin."""
  bar = figure.colorbar(
    image,
    cax=_bar_axes(figure, grid),
    extend='max',
    extendfrac=0.04,
    ticks=[0, 0.5, 1, 1.5, 2],
  )
  bar.set_label(label)
  bar.outline.set_visible(False)


def _layer_bar(figure: Any, grid: Any, layers: Sequence[int]) -> None:
  """Draws a bar of the layers' hues in the right margin."""
  from matplotlib import cm, colors

  hues = colors.ListedColormap(
    figures.colormap('viridis')(np.linspace(0, 0.9, len(layers)))
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


def _multiples(
  layers: Sequence[int],
  name: str,
  draw: Callable,
  *,
  bar: str = '',
  across: str = 'step',
) -> list[str]:
  """Draws a panel per layer, in figures of a few rows.

  Args:
    layers: [L] numbers of the layers.
    name: of the vertical axis.
    draw: (axes, index of a layer) -> the image, or None for lines.
    bar: label of the colour bar; '' for none.
    across: name of the horizontal axis.
  """
  chunk = _COLUMNS * _ROWS
  starts = range(0, len(layers), chunk)
  picks = [range(s, min(s + chunk, len(layers))) for s in starts]
  names = name, across
  return [_multiple(pick, layers, names, draw, bar) for pick in picks]


@figures.drawn
def _multiple(
  pick: range,
  layers: Sequence[int],
  names: tuple[str, str],
  draw: Callable,
  bar: str,
) -> Any:
  """Draws the panels of the layers in `pick`; `names` are those of the axes."""
  name, across = names
  columns = min(len(pick), _COLUMNS)
  rows = math.ceil(len(pick) / columns)
  figure, grid = figures.grid([1.25] * rows, columns, (0.3, 0.34), bool(bar))
  figure.set_dpi(200 if len(layers) <= _FINE else 110)
  cells = grid.subplots(squeeze=False, sharex=True, sharey=True)
  for axes, n in zip(cells.flat, pick):
    image = draw(axes, n)
    axes.set_title(f'layer {layers[n]}')
    if across == 'step':
      figures.step_axis(axes, bins=4)
  for axes in cells.flat[len(pick) :]:
    axes.set_axis_off()
  for axes in cells[-1]:
    axes.set_xlabel(across)
  figure.supylabel(name, x=0.008, fontsize=9, color='#565c66')
  if bar:
    _load_bar(figure, grid, image, bar)
  return figure


def _bar_axes(figure: Any, grid: Any) -> Any:
  """Returns axes for a colour bar in the right margin of the grid."""
  bottom, top = grid.bottom, grid.top
  return figure.add_axes(
    (1 - 0.72 / figures.INCHES, bottom, 0.11 / figures.INCHES, top - bottom)
  )
