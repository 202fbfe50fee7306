"""The file of results of benchmarks.kernels, and its table."""

import dataclasses
import datetime
import json
import os
import pathlib
import re
from typing import Any

from benchmarks.kernel_plan import Case, every_case

_COLUMNS = (
  ('op', 'op'),
  ('shape', 'shape'),
  ('error', 'error'),
  ('us', 'us'),
  ('tflops', 'TFLOP/s'),
  ('tbytes', 'TB/s'),
  ('of_floor', 'floor/time'),
  ('target', 'target'),
  ('tokens_per_second', 'tokens/s'),
  ('over_xla', 'XLA/time'),
  ('over_cudnn', 'cuDNN/time'),
  ('over_torch', 'torch/time'),
  ('over_flash_mla', 'FlashMLA/time'),
  ('over_triton', 'Triton/time'),
  ('date', 'date'),
  ('note', 'note'),
)


@dataclasses.dataclass
class Report:
  """Holds what was measured on one kind of device with one version of jax."""

  device: str = ''
  jax: str = ''
  date: str = ''
  floors: dict[str, Any] = dataclasses.field(default_factory=dict)
  rows: list[dict] = dataclasses.field(default_factory=list)

  def of_now(self, seen: dict, floors: dict) -> 'Report':
    """The report of a run that begins: its rates, and the rows kept so far."""
    today = datetime.date.today().isoformat()
    return Report(seen['device'], seen['jax'], today, floors, list(self.rows))

  def put(self, case: Case, row: dict) -> None:
    """Adds a row, or replaces the one of this op and shape."""
    row = {'op': case.op, 'shape': case.shape} | row
    order = {(c.op, c.shape): i for i, c in enumerate(every_case())}
    key = lambda row: (row['op'], row['shape'])
    self.rows = [r for r in self.rows if key(r) != key(row)] + [row]
    self.rows.sort(key=lambda r: order.get(key(r), len(order)))


def path_of(folder: pathlib.Path, device: str, jax: str) -> pathlib.Path:
  """The file's path without its ending, .json or .md."""
  plain = re.sub(r'[^\w.-]+', '-', device)
  return pathlib.Path(folder) / f'kernels-{plain}-{jax}'


def _named(path: pathlib.Path, ending: str) -> pathlib.Path:
  return path.with_name(path.name + ending)


def read(path: pathlib.Path) -> Report:
  """The report in a file; an empty one where there is none.

  Raises:
    ValueError: the file is no report.
  """
  file = _named(path, '.json')
  if not file.exists():
    return Report()
  try:
    found = json.loads(file.read_text())
    fields = {f.name for f in dataclasses.fields(Report)}
    report = Report(**{k: v for k, v in found.items() if k in fields})
    for row in report.rows:
      row['op'], row['shape']
      row.setdefault('date', report.date)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{file} is no report of benchmarks.kernels ({error!r}); move it away'
    ) from None
  return report


def write(report: Report, path: pathlib.Path) -> None:
  """Writes the report and its table, each as a whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dataclasses.asdict(report), indent=1) + '\n'
  for ending, content in (('.json', text), ('.md', table(report))):
    new = _named(path, ending + '.new')
    new.write_text(content)
    os.replace(new, _named(path, ending))


def _cell(row: dict, key: str) -> str:
  """A number with three digits; why there is none."""
  if key == 'note':
    notes = [row.get('failed', ''), row.get('note', '')]
    how = row.get('how', 'cupti')
    notes.append('' if how == 'cupti' else how)
    return '; '.join(filter(None, notes)).replace('|', '/')
  if key == 'target':
    return _target(row)
  value = row.get(key, '')
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def _target(row: dict) -> str:
  """Returns what a row should reach, and whether it does."""
  target = Case(row['op'], row['shape']).target
  if target is None:
    return ''
  name, least = target
  said = f'{dict(_COLUMNS)[name]} >= {least:g}'
  if name not in row:
    return said
  return f'{said}: {"met" if row[name] >= least else "missed"}'


def table(report: Report) -> str:
  """The rows as Markdown."""
  rates = [
    f'{v:.3g} {k}/s' if isinstance(v, float) else str(v)
    for k, v in report.floors.items()
  ]
  lines = [
    f'{report.device}, jax {report.jax}, {report.date}; floors: '
    + ', '.join(rates),
    '',
    '| ' + ' | '.join(title for _, title in _COLUMNS) + ' |',
    '|' + '---|' * len(_COLUMNS),
  ]
  for row in report.rows:
    cells = [_cell(row, key) for key, _ in _COLUMNS]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'
