"""Writes the report of a run: one HTML file that needs nothing else.

`write_report` reads what the run left in its folder and draws it: scalars
(`metrics.jsonl`, `timings.jsonl`), routing (`routing.npz`), time by phase
(`timeline.jsonl`, lines `{"phase": "step", "seconds": 1.5}`) and the resolved
configuration (`config.json`). Each is optional. The page loads nothing from
anywhere, prints in full, and shows text that the model wrote as text only.

Legend: N intervals, L MoE layers, E experts.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.console import short
from deepseek_jax.errors import InputError
from deepseek_jax.record import metrics
from deepseek_jax.record.json_lines import read_lines
from deepseek_jax.record.metric import Metric, described
from deepseek_jax.record.report import curves as figures
from deepseek_jax.record.report.expert_section import routing_section

# First word of a scalar's name -> the curve of the panel that it is.
_SPLITS = {
  'train': 'training',
  'validation': 'validation',
  'val': 'validation',
  'eval': 'validation',
}


@dataclass(frozen=True)
class Sample:
  """Holds a text of the model: it wrote `text` after `prompt`."""

  prompt: str
  text: str
  kind: str = 'sample'


def environment() -> Any:
  """Returns the jinja2.Environment of the pages; it escapes texts."""
  import jinja2

  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


def write_report(
  workdir: str | os.PathLike,
  *,
  title: str,
  facts: Mapping[str, str | int | float],
  samples: Sequence[Sample] = (),
  notes: Sequence[str] = (),
) -> Path:
  """Writes `workdir/report.html` and returns its path.

  Args:
    workdir: the run's folder.
    title: headline of the page.
    facts: what to know first, in order: name -> value, such as bits per byte,
      that of `xz -9` beside it, tokens per second, parameters.
    samples: texts by the model; untrusted, escaped.
    notes: paragraphs under the headline.

  Raises:
    InputError: a file in the folder is not what its name promises.
  """
  workdir = Path(workdir)
  page = (
    environment()
    .get_template('report.html.jinja')
    .render(
      title=title,
      facts=[(name, *_fact(value)) for name, value in facts.items()],
      notes=notes,
      curves=_curves(workdir),
      routing=routing_section(workdir / 'routing.npz'),
      timeline=_timeline(workdir / 'timeline.jsonl'),
      samples=[_visible(sample) for sample in samples],
      config=_config(workdir / 'config.json'),
    )
  )
  path = workdir / 'report.html'
  with files.whole(path) as scratch:
    # A lone surrogate, which a byte-level sampler can give, has no UTF-8.
    scratch.write_bytes(page.encode('utf-8', 'backslashreplace'))
  return path


def _fact(value: str | int | float) -> tuple[str, str]:
  """Returns a headline value in short, and exactly where that shows less."""
  if isinstance(value, str):
    return value, ''
  if isinstance(value, (int, np.integer)):
    return _count(int(value))
  return short(float(value)), ''


def _count(value: int) -> tuple[str, str]:
  """Returns a count in short, and in full where it was shortened."""
  for unit, size in (('T', 10**12), ('B', 10**9), ('M', 10**6)):
    if abs(value) >= size:
      return f'{value / size:.4g} {unit}', f'{value:,}'
  return f'{value:,}', ''


def _curves(workdir: Path) -> dict[str, Any] | None:
  """Returns figures of all scalars, and their numbers; None without any."""
  rows = metrics.read(workdir), metrics.read(workdir, 'timings')
  named, known = [_by_name(r) for r in rows], described(workdir)
  panels = _panels(named[0], known) + _panels(named[1], known)
  if not panels:
    return None
  broken = [
    (name, int(s[~np.isfinite(v)][0]), int((~np.isfinite(v)).sum()))
    for name, (s, v) in named[0].items()
    if not np.isfinite(v).all()
  ]
  steps = [row['step'] for row in rows[0] + rows[1]]
  parts = [part for part in (panels[:1], panels[1:]) if part]
  return {
    'title': panels[0].title,
    'linear': [figures.curves(part) for part in parts],
    'log': [
      figures.curves(part, log_x=True) for part in parts if max(steps) >= 10
    ],
    'averaged': max(len(s.steps) for p in panels for s in p.series)
    > figures.POINTS,
    'broken': broken,
    'table': [_summary(n, *c) for n, c in (named[0] | named[1]).items()],
  }


def _by_name(
  rows: Sequence[Mapping[str, float]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns scalar -> (steps, values), in the order in which names appeared."""
  points: dict[str, list] = {}
  for row in rows:
    for name, value in row.items():
      if name != 'step':
        points.setdefault(name, []).append((row['step'], value))
  return {
    name: (np.array([s for s, _ in p]), np.array([v for _, v in p], float))
    for name, p in points.items()
  }


def _panels(
  curves: Mapping[str, tuple], known: Mapping[str, Metric]
) -> list[figures.Panel]:
  """Returns a panel per scalar, its training and validation curves together."""
  panels: dict[str, list] = {}
  for name, (steps, values) in curves.items():
    first, _, rest = re.sub('[/.]', '_', name).partition('_')
    split, base = 'training', name
    if first in _SPLITS and rest:
      split, base = _SPLITS[first], rest
    series = figures.Series(split, steps, values)
    panels.setdefault(base, []).append(series)
  order = [*known, *(name for name in panels if name not in known)]
  return [
    _panel(known.get(name, Metric(figures.title(name))), panels[name])
    for name in order
    if name in panels
  ]


def _panel(known: Metric, series: list[figures.Series]) -> figures.Panel:
  """Returns the panel of a metric; its title names validation if alone."""
  title, unit = known.title, known.unit
  if [s.label for s in series] == ['validation']:
    title = f'Validation {title[:1].lower()}{title[1:]}'
  return figures.Panel(title, unit, series)


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


def _timeline(path: Path) -> list[tuple[str, float, float]]:
  """Returns phases with their seconds and percent of all, the longest first."""
  rows, damaged = read_lines(
    path, lambda row: (row['phase'], float(row['seconds']))
  )
  if damaged:
    number, line = damaged[0]
    raise InputError(
      f'{path}, line {number}: {line[:60]!r} is not'
      ' {"phase": name, "seconds": number}; remove the line'
    )
  seconds: dict[str, float] = {}
  for _, (phase, added) in rows:
    seconds[phase] = seconds.get(phase, 0.0) + added
  total = math.fsum(seconds.values())
  rows = sorted(seconds.items(), key=lambda item: -item[1])
  return [(p, s, 100 * s / total if total else 0.0) for p, s in rows]


def _visible(sample: Sample) -> Sample:
  """Returns a sample with pictures for control characters; nothing vanishes."""
  picture = lambda match: chr(0x2400 + ord(match[0]))
  shown = lambda text: re.sub(r'[\x00-\x08\x0b-\x1f]', picture, text)
  return Sample(shown(sample.prompt), shown(sample.text), shown(sample.kind))


def _config(path: Path) -> str:
  """Returns the run's configuration as indented JSON; '' if there is none."""
  if not path.exists():
    return ''
  try:
    return json.dumps(json.loads(path.read_text('utf-8')), indent=2)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path} is not JSON ({error}): write it anew') from None
