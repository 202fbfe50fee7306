"""Writes the report of a run: one HTML file that needs nothing else.

`write_report` reads what the run left in its folder and draws it: scalars
(`metrics.jsonl`, `timings.jsonl`), routing (`routing.npz`), time by phase
(`timeline.jsonl`, lines `{"phase": "step", "seconds": 1.5}`) and the resolved
configuration (`config.json`). Each is optional. It keeps what it is given in
`report.json`, so that `redraw` can do without. The page loads nothing from
anywhere, reads without its script, prints in full, and shows text that the
model wrote as text only.
"""

import base64
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.console import short
from deepseek_jax.errors import InputError
from deepseek_jax.record.json_lines import read_lines
from deepseek_jax.record.report.expert_section import routing_section
from deepseek_jax.record.report.scalars import scalar_section

FILE = 'report.json'
_TEMPLATES = Path(__file__).parent / 'templates'


@dataclass(frozen=True)
class Sample:
  """Holds a text of the model: it wrote `text` after `prompt`."""

  prompt: str
  text: str
  kind: str = 'sample'


@dataclass(frozen=True)
class Told:
  """Holds what a report shows that no other file of the run's folder has.

  Attributes:
    title: headline of the page.
    facts: (name, value in short, exact value or '').
    samples: texts by the model.
    notes: paragraphs under the headline.
  """

  title: str
  facts: Sequence[tuple[str, str, str]] = ()
  samples: Sequence[Sample] = ()
  notes: Sequence[str] = ()


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
  made = told(title, facts, samples, notes)
  path = draw(workdir, made)
  with files.whole(Path(workdir, FILE)) as scratch:
    scratch.write_text(json.dumps(asdict(made), indent=1) + '\n')
  return path


def told(
  title: str,
  facts: Mapping[str, str | int | float],
  samples: Sequence[Sample] = (),
  notes: Sequence[str] = (),
) -> Told:
  """Returns the arguments of `write_report` as a report shows them."""
  shown = [(name, *_fact(value)) for name, value in facts.items()]
  return Told(title, shown, list(samples), list(notes))


def draw(
  workdir: str | os.PathLike,
  shown: Told,
  *,
  beside: Mapping[str, Path] | None = None,
  out: str | os.PathLike | None = None,
) -> Path:
  """Writes a report, by default `workdir/report.html`; returns its path.

  Args:
    workdir: the run's folder.
    shown: what the folder does not hold.
    beside: name -> folder of other runs, whose curves are laid over.
    out: where the page goes.

  Raises:
    InputError: a file in a folder is not what its name promises.
  """
  workdir = Path(workdir)
  return write(
    Path(out) if out else workdir / 'report.html',
    'report.html.jinja',
    title=shown.title,
    facts=shown.facts,
    notes=shown.notes,
    curves=scalar_section(workdir, beside or {}),
    routing=routing_section(workdir / 'routing.npz'),
    timeline=_timeline(workdir / 'timeline.jsonl'),
    samples=[_visible(sample) for sample in shown.samples],
    config=_config(workdir / 'config.json'),
  )


def read_told(workdir: str | os.PathLike) -> Told | None:
  """Returns what `write_report` kept; None of a run that has no report yet.

  Raises:
    InputError: the file holds something else.
  """
  path = Path(workdir, FILE)
  if not path.exists():
    return None
  held = files.load_json(str(path))
  try:
    raw = Told(**held)
    facts = [(str(n), str(v), str(e)) for n, v, e in raw.facts]
    texts = [{k: str(v) for k, v in sample.items()} for sample in raw.samples]
    samples = [Sample(**text) for text in texts]
    return Told(str(raw.title), facts, samples, [*map(str, raw.notes)])
  except (TypeError, ValueError, AttributeError) as error:
    raise InputError(
      f'{path}: is not what a report keeps ({error}); remove it'
    ) from None


def write(path: Path, template: str, **values: Any) -> Path:
  """Writes a page whole or not at all; returns its path.

  Args:
    path: of the page.
    template: its file in `templates/`.
    **values: what the template names; texts among them are escaped.
  """
  script = _script()
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  page = (
    _environment()
    .get_template(template)
    .render(script=script, script_hash=digest, **values)
  )
  with files.whole(path) as scratch:
    # A lone surrogate, which a byte-level sampler can give, has no UTF-8.
    scratch.write_bytes(page.encode('utf-8', 'backslashreplace'))
  return path


@functools.cache
def _script() -> str:
  """Returns the pages' script; the browser runs no other."""
  parts = ('charts.js', 'inspector.js')
  return ''.join((_TEMPLATES / name).read_text('utf-8') for name in parts)


@functools.cache
def _environment() -> Any:
  """Returns the jinja2.Environment of the pages; it escapes texts."""
  import jinja2

  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


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
