"""Draws a ladder: losses over compute, and the compute that each rung needs.

Matplotlib is imported on the first call and needs no window.
"""

import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import naming
from deepseek_jax.ladder.table import (
  budget_means,
  bytes_text,
  counted,
  ratio_text,
)

_STYLE = {
  'font.size': 9,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.titleweight': 'bold',
  'axes.titlepad': 10,
  'axes.edgecolor': '#9aa0a8',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.labelcolor': '#565c66',
  'axes.axisbelow': True,
  'grid.color': '#e7e9ec',
  'text.color': '#26292e',
  'text.parse_math': False,
  'xtick.color': '#565c66',
  'ytick.color': '#26292e',
}
_COLORS = {
  'dense': '#9aa0a8',
  'Llama 3': '#26292e',
  'before DeepSeekMoE': '#c28fb8',
  'DeepSeekMoE': '#8a5aa8',
  'V2': '#2f6db5',
  'V3': '#3a8f6b',
  'V3.2': '#a67c1a',
  'V4': '#c4512d',
  'Engram': '#e3a07f',
}
_OTHER = '#5b6470'
_MARKS = 'os^Dv'
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)


def _color(told: Mapping) -> str:
  """Returns the colour of a rung's generation."""
  return _COLORS.get(told['generation'], _OTHER)


def _curves(axes: Any, found: Mapping) -> None:
  """Draws bits per byte over training FLOPs, a line for each rung."""
  budgets = sorted(found['size']['budgets'])
  seen: dict[str, int] = {}
  for rung, told in found['rungs'].items():
    generation = told['generation']
    number = seen.setdefault(generation, 0)
    seen[generation] += 1
    pairs = [
      (b, m)
      for b, m in zip(budgets, budget_means(found, rung))
      if m is not None
    ]
    axes.plot(
      *zip(*pairs),
      color=_color(told),
      marker=_MARKS[number % len(_MARKS)],
      markersize=4,
      linewidth=1.6 if rung == found['first'] else 1.1,
      linestyle=('-', '--', ':', '-.')[number % 4],
      label=rung,
    )
  axes.set_xscale('log')
  axes.set_xticks(budgets, [f'{b:.1e}' for b in budgets])
  axes.minorticks_off()
  axes.grid(True)
  axes.set_xlabel('training FLOPs, by the planner')
  axes.set_ylabel('held-out bits per byte')
  axes.set_title('Loss at equal compute')
  axes.legend(frameon=False, ncols=2, fontsize=8, handlelength=3.2)


def _limits(found: Mapping) -> tuple[float, float]:
  """Returns the axis of the ratios, wide enough for all but wild intervals."""
  reached = [r for r in found['reach'].values() if r]
  low = min(min(r['ratio'], max(r['low'], r['ratio'] / 3)) for r in reached)
  high = max(max(r['ratio'], min(r['high'], r['ratio'] * 3)) for r in reached)
  whole = [counted(found, rung) for rung in found['rungs']]
  high = max([high, *filter(None, whole)])
  return low / 1.2, high * 1.2


def _forest(axes: Any, found: Mapping) -> None:
  """Draws compute to the goal, a row for each rung, with what it caches."""
  rungs = list(found['rungs'])
  low, high = _limits(found)
  axes.set_xscale('log')
  axes.set_xlim(low, high)
  for row, rung in enumerate(rungs):
    told, reach = found['rungs'][rung], found['reach'].get(rung)
    color = _color(told)
    _row(axes, row, ratio_text(reach), bytes_text(told['plan']['cache']))
    if reach is None:
      continue
    ends = [max(reach['low'], low), min(reach['high'], high)]
    axes.plot(
      ends, [row, row], color=color, linewidth=2.2, solid_capstyle='butt'
    )
    face = color if reach['measured'] else 'white'
    axes.plot(
      [reach['ratio']], [row], 'o', color=color, markerfacecolor=face,
      markersize=6,
    )  # fmt: skip
    if whole := counted(found, rung):
      axes.plot([whole], [row], 'x', color=color, markersize=7)
  labels = [f'{n}  ({found["rungs"][n]["generation"] or "own"})' for n in rungs]
  axes.set_yticks(range(len(rungs)), labels)
  axes.set_ylim(len(rungs) - 0.4, -0.6)
  axes.axvline(1, color='#26292e', linewidth=1, linestyle=(0, (4, 3)))
  ticks = [t for t in _TICKS if low <= t <= high]
  axes.set_xticks(ticks, [f'{t:g}' for t in ticks])
  axes.minorticks_off()
  axes.grid(True, axis='x')
  axes.tick_params(axis='y', length=0)
  axes.set_xlabel(
    f'compute to the last loss of {found["first"]}, as a share of its own'
  )
  axes.set_title('Compute that each rung needs: less is better')
  _row(axes, -0.95, 'share (95 %)', 'cache', weight='bold')


def _row(axes: Any, row: float, share: str, cache: str, **how: Any) -> None:
  """Writes the two columns beside the intervals."""
  how |= {'va': 'center', 'transform': _beside(axes), 'fontsize': 8}
  axes.text(1.02, row, share, **how)
  axes.text(1.42, row, cache, ha='right', **how)


def _beside(axes: Any) -> Any:
  """Returns a transform: x in widths of the axes, y in its data."""
  return axes.get_yaxis_transform()


def draw(found: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Writes the picture of a ladder.

  Args:
    found: of `measured.conclusion`, with 'name'.
    path: of the file.
  """
  from matplotlib import style
  from matplotlib.figure import Figure

  with style.context(_STYLE, after_reset=True):
    figure = Figure((13, 6.2))
    left, right = figure.subplots(1, 2, gridspec_kw={'width_ratios': [1, 1]})
    figure.subplots_adjust(
      left=0.05, right=0.84, top=0.85, bottom=0.09, wspace=0.54
    )
    shape = found['size']['shape']
    figure.text(
      0.015, 0.955, 'From Llama to V4, one idea at a time', fontsize=15,
      weight='bold', va='center',
    )  # fmt: skip
    figure.text(
      0.015,
      0.915,
      f'width {shape["dim"]}, {shape["layers"]} layers; on the right, filled:'
      ' measured on both sides, open: the curve extended, cross: with the'
      " optimizer's own products; cache of"
      f' {found["size"]["seq_len"]} tokens in bfloat16',
      color='#565c66',
      va='center',
    )
    _curves(left, found)
    _forest(right, found)
    with naming(path):
      figure.savefig(path, dpi=130)
