"""Draws a plan, and the timeline of a pipeline.

Matplotlib is imported on the first call and needs no window.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from deepseek_jax.errors import naming
from deepseek_jax.pipeline.simulate import SimulatedStep
from deepseek_jax.plan.flops import INDEX, PARTS
from deepseek_jax.plan.memory import CLASSES
from deepseek_jax.plan.report import POLICIES, Report

_COLORS = (
  '#2f6db5',
  '#7fa8d6',
  '#c4512d',
  '#e3a07f',
  '#3a8f6b',
  '#8a5aa8',
  '#a67c1a',
  '#5b6470',
  '#c28fb8',
  '#8fae3c',
  '#26292e',
)
_STYLE = {
  'font.size': 9,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.titleweight': 'bold',
  'axes.titlepad': 8,
  'axes.edgecolor': '#9aa0a8',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.labelcolor': '#565c66',
  'axes.axisbelow': True,
  'axes.grid.axis': 'x',
  'grid.color': '#e7e9ec',
  'text.color': '#26292e',
  'text.parse_math': False,
  'xtick.color': '#565c66',
  'ytick.color': '#26292e',
  'ytick.left': False,
}


def _style() -> AbstractContextManager[None]:
  """Returns the context of this file's matplotlib style."""
  from matplotlib import style

  return style.context(_STYLE, after_reset=True)


def _stack(
  axes: Any,
  row: int,
  parts: Sequence[tuple[float, str]],
  colors: Sequence[str],
  height: float = 0.62,
) -> float:
  """Draws a bar of (value, label), wide parts labelled; returns its end."""
  left, limit = 0.0, axes.get_xlim()[1]
  for (value, label), color in zip(parts, colors[: len(parts)], strict=True):
    axes.barh(row, value, height, left=left, color=color, linewidth=0)
    if label and value > 0.055 * limit:
      axes.text(
        left + value / 2, row, label, ha='center', va='center', color='white'
      )
    left += value
  return left


def _memory(axes: Any, report: Report) -> None:
  """Draws the bytes of the fullest device, a bar per remat policy."""
  limit = report.cluster.accelerator.memory.value / 1e9
  totals = {p: sum(report.memory[p].values()) / 1e9 for p in POLICIES}
  axes.set_xlim(0, 1.12 * max(limit, *totals.values()))
  for row, policy in enumerate(POLICIES):
    held = [report.memory[policy][c] / 1e9 for c in CLASSES]
    parts = [(v, f'{v:.0f}') for v in held]
    end = _stack(axes, row, parts, _COLORS)
    text = f' {totals[policy]:.0f} GB'
    axes.text(end, row, text, va='center', ha='left')
  axes.axvline(limit, color='#26292e', linewidth=1, linestyle=(0, (4, 3)))
  name = report.cluster.accelerator.name.upper()
  label = f'{name}: {limit:.0f} GB'
  axes.text(limit, -0.62, f' {label}', va='center', fontsize=8)
  names = {'none': 'keep all', 'dots': 'keep matmuls', 'full': 'keep inputs'}
  own = {p: ' *' if p == report.policy else '' for p in POLICIES}
  axes.set_yticks(range(len(POLICIES)), [names[p] + own[p] for p in POLICIES])
  axes.set_ylim(2.6, -0.95)
  axes.set_xlabel('GB')
  axes.set_title(
    'Memory of the fullest device, by what is saved for the backward pass'
    ' (* as configured)'
  )
  _legend(axes, CLASSES, _COLORS)


def _legend(axes: Any, names: Iterable[str], colors: Iterable[str]) -> None:
  """Draws a legend to the right of the axes."""
  from matplotlib.patches import Patch

  patches = [Patch(color=c, label=n) for n, c in zip(names, colors)]
  axes.legend(
    handles=patches,
    loc='center left',
    bbox_to_anchor=(1.005, 0.5),
    frameon=False,
    handlelength=0.9,
    handleheight=0.9,
  )


def _flops(axes: Any, report: Report) -> None:
  """Draws training FLOPs per token by part, causal and not."""
  rows = (
    ('causal', report.flops['half']),
    ('not causal', report.flops['full']),
  )
  axes.set_xlim(0, 1.16 * max(f.per_token for _, f in rows) / 1e9)
  used = [p for p in PARTS if report.flops['half'].forward.get(p)]
  for row, (_, count) in enumerate(rows):
    # As in Flops.training: an indexer's scores have no gradient here.
    passes = {p: 1 if p == INDEX else 3 for p in used}
    each = [passes[p] * count.forward[p] / count.length / 1e9 for p in used]
    end = _stack(axes, row, [(v, f'{v:.0f}') for v in each], _COLORS)
    axes.text(end, row, f' {end:.1f} GFLOP', va='center')
  axes.set_yticks(range(len(rows)), [name for name, _ in rows])
  axes.set_ylim(1.6, -0.6)
  axes.set_xlabel('GFLOP per token, forward and backward')
  length = f'{report.recipe.training.seq_len:,}'
  axes.set_title(f'Training FLOPs of a token in a sequence of {length}')
  _legend(axes, used, _COLORS)


def _time(axes: Any, report: Report) -> None:
  """Draws the parts of a step and, below, its bounds and planned time."""
  t = report.time
  parts = (
    ('compute at the peak', t.compute),
    ('pipeline bubble', t.bubble),
    ('optimizer update', t.update),
    ('fast links', t.fast),
    ('slow links', t.slow),
  )
  most = max(t.most, t.planned)
  axes.set_xlim(0, 1.12 * most)
  labels = [name for name, _ in parts]
  for row, (_, value) in enumerate(parts):
    axes.barh(row, value, 0.62, color=_COLORS[row], linewidth=0)
    axes.text(value, row, f' {value:#.3g} s', va='center')
  row = len(parts)
  axes.barh(row, t.most, 0.62, color='#dfe3e8', linewidth=0)
  axes.barh(row, t.least, 0.62, color='#9aa3ad', linewidth=0)
  inside = {'y': row, 'va': 'center', 'ha': 'center'}
  middle = (t.least + t.most) / 2
  axes.text(t.least / 2, s=f'all overlaps: {t.least:#.3g} s', **inside)
  axes.text(middle, s=f'nothing overlaps: {t.most:#.3g} s', **inside)
  axes.plot([t.planned] * 2, [row - 0.45, row + 0.31], color='#c4512d', lw=2)
  axes.text(
    t.planned,
    row - 0.5,
    f'planned: {t.planned:#.3g} s at {report.recipe.utilization:.1%} of peak',
    ha='right',
    va='bottom',
    color='#c4512d',
  )
  axes.set_yticks(range(row + 1), [*labels, 'whole step'])
  axes.set_ylim(row + 0.6, -0.6)
  axes.set_xlabel('seconds')
  axes.set_title('A training step at full rates')


def _head(report: Report, name: str) -> tuple[str, str]:
  """Returns the title and the line of figures below it."""
  p, cost = report.parameters, report.cost
  sizes = ' x '.join(
    f'{getattr(report.recipe.mesh, axis)} {axis}'
    for axis in ('data', 'fsdp', 'expert', 'tensor', 'context', 'stage')
    if getattr(report.recipe.mesh, axis) > 1
  )
  cluster = report.cluster
  devices = f'{cluster.devices:,} {cluster.accelerator.name.upper()}'
  first = f'{name} on {devices}' + (f' ({sizes})' if sizes else '')
  second = (
    f'{p.total / 1e9:.1f} B parameters, {p.active / 1e9:.1f} B active;'
    f' KV cache {report.cache.configured:,} bytes per token;'
    f' {report.recipe.tokens / 1e12:g} T tokens in {cost.days:.1f} days,'
    f' {cost.device_hours / 1e6:.2f} M device-hours,'
    f' ${cost.dollars / 1e6:.2f} M'
  )
  return first, second


def plan_figure(report: Report, name: str = 'Plan') -> Any:
  """Returns the picture of a plan: memory, FLOPs by part, time bounds."""
  from matplotlib.figure import Figure

  with _style():
    figure = Figure((11, 8.4))
    rows = figure.subplots(
      3, 1, gridspec_kw={'height_ratios': [3.2, 2.2, 4.2], 'hspace': 0.62}
    )
    figure.subplots_adjust(left=0.185, right=0.82, top=0.855, bottom=0.065)
    first, second = _head(report, name)
    figure.text(0.02, 0.965, first, fontsize=15, weight='bold', va='center')
    figure.text(0.02, 0.93, second, fontsize=9.5, color='#565c66', va='center')
    for axes, draw in zip(rows, (_memory, _flops, _time)):
      axes.grid(True, axis='x')
      draw(axes, report)
  return figure


def draw_plan(
  report: Report, path: str | os.PathLike, name: str = 'Plan'
) -> None:
  """Writes the picture of a plan to a file."""
  figure = plan_figure(report, name)
  with _style(), naming(path):
    figure.savefig(path, dpi=130)


def draw_timeline(
  timeline: SimulatedStep, path: str | os.PathLike, title: str = ''
) -> None:
  """Writes a pipeline's timeline: ranks downwards, time to the right."""
  from matplotlib.figure import Figure

  colors = {'F': '#7fa8d6', 'B': '#3a8f6b', 'I': '#6fbf9b', 'W': '#e3c07f'}
  both = '#8a5aa8'
  names = {
    'F': 'forward',
    'B': 'backward',
    'I': 'input gradient',
    'W': 'weight gradient',
  }
  with _style():
    figure = Figure((12, 1.4 + 0.3 * timeline.ranks))
    axes = figure.subplots()
    for rank, start, end, step in timeline.spans:
      color = both if len(step) == 2 else colors[step[0].kind]
      width = end - start
      axes.barh(rank, width, 0.86, start, color=color, ec='white', lw=0.6)
      if step[0].direction:  # came in from the far end
        axes.barh(rank + 0.36, width, 0.14, start, color='#26292e')
    axes.set_yticks(range(timeline.ranks))
    axes.set_ylim(timeline.ranks - 0.4, -0.6)
    axes.set_xlim(0, timeline.length)
    axes.set_xlabel('time')
    axes.set_ylabel('rank')
    share = timeline.bubble / timeline.length
    axes.set_title(
      f'{title} a rank idles at most {share:.1%} of a step'.strip()
    )
    kinds = {len(s.step) == 2 or s.step[0].kind for s in timeline.spans}
    shown = [k for k in names if k in kinds]
    labels = [names[k] for k in shown]
    used = [colors[k] for k in shown]
    if True in kinds:
      labels.append('both, overlapped')
      used.append(both)
    if any(s.step[0].direction for s in timeline.spans):
      labels.append('from the far end')
      used.append('#26292e')
    _legend(axes, labels, used)
    with naming(path):
      figure.savefig(path, dpi=130, bbox_inches='tight')
