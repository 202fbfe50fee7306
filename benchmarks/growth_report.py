"""Writes what `benchmarks.growth` found: a line, a table, a plot."""

import math
import pathlib

MIB = 2.0**-20
_NAMES = {'tokens': 'T', 'experts': 'E', 'layers': 'L', 'batch': 'B'}


def line(record: dict) -> str:
  """Returns a record for the console."""
  name = f'{record["what"]} {record["run"]}'
  return (
    f'{record["study"]:<8} {name:<24} {record["size"]:>6}'
    f' {record["seconds"] * 1e3:10.1f} ms'
    f' {record["processor_seconds"] * 1e3:10.1f} ms of processor'
    f' {record["program_bytes"] * MIB:9.1f} MiB,'
    f' compiled in {record["compile_seconds"]:.1f} s'
  )


def curves(records: list[dict]) -> dict[tuple, dict[int, dict]]:
  """Returns (study, what, pass) -> size -> record."""
  out: dict[tuple, dict[int, dict]] = {}
  for record in records:
    key = record['study'], record['what'], record['run']
    out.setdefault(key, {})[record['size']] = record
  return out


def growth(
  curve: dict[int, dict], what: str, first: int | None = None
) -> float | None:
  """Returns the power of the size by which a curve grows, end to end.

  Args:
    curve: size -> record.
    what: of the record.
    first: the size to begin with, by default the least; None is returned if
      there is none such, or no greater one.
  """
  sizes = sorted(size for size in curve if size >= (first or 0))
  if len(sizes) < 2 or (first and sizes[0] != first):
    return None
  ratio = curve[sizes[-1]][what] / curve[sizes[0]][what]
  return math.log(ratio) / math.log(sizes[-1] / sizes[0])


def _digits(value: float) -> str:
  return f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def table(records: list[dict]) -> str:
  """Returns Markdown: a table for each study, with the powers of growth."""
  lines, made = [], curves(records)
  for study in dict.fromkeys(record['study'] for record in records):
    some = {key: curve for key, curve in made.items() if key[0] == study}
    sizes = sorted({size for curve in some.values() for size in curve})
    lines += [f'### {study}', '']
    head = [f'{_NAMES[study]}={size}' for size in sizes]
    grows = 'grows as'
    lines.append(f'| what | {" | ".join([*head, grows])} |')
    lines.append('|---' * (len(sizes) + 2) + '|')
    for (_, what, run), curve in some.items():
      for field, unit, factor in (
        ('seconds', 'ms', 1e3),
        ('processor_seconds', 'ms of processor', 1e3),
        ('program_bytes', 'MiB', MIB),
      ):
        cells = [
          _digits(curve[n][field] * factor) if n in curve else '' for n in sizes
        ]
        first = 4096 if study == 'tokens' else None
        power = growth(curve, field, first)
        cells.append('' if power is None else f'{_NAMES[study]}^{power:.2f}')
        lines.append(f'| {what} {run}, {unit} | {" | ".join(cells)} |')
    lines.append('')
  return '\n'.join([*lines, *_about(records)]) + '\n'


def _about(records: list[dict]) -> list[str]:
  """Returns lines on what was measured where."""
  where = {(r['machine'], r['jax'], r['date'], r['commit']) for r in records}
  lines = [
    'Growth in tokens is from 4,096 to the longest; each cell is measured again'
    ' by `python -m benchmarks.growth --again --only=STUDY/WHAT/PASS/SIZE`.',
    '',
  ]
  for machine, jax, date, commit in sorted(where):
    lines.append(f'- {machine}; jax {jax}; {date}; commit {commit}')
  return lines


def plot(records: list[dict], path: pathlib.Path) -> None:
  """Draws time (top) and memory of every study."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  made = curves(records)
  studies = list(dict.fromkeys(record['study'] for record in records))
  figure, axes = pyplot.subplots(
    2, len(studies), figsize=(3.4 * len(studies), 5.6), squeeze=False
  )
  units = (('seconds', 's', 1.0), ('program_bytes', 'MiB', MIB))
  for column, study in enumerate(studies):
    some = [(key, c) for key, c in made.items() if key[0] == study]
    colors = {
      w: f'C{i}' for i, w in enumerate(dict.fromkeys(k[1] for k, _ in some))
    }
    for panel, (what, unit, factor) in zip(axes[:, column], units):
      for (_, name, run), curve in some:
        sizes = sorted(curve)
        panel.plot(
          sizes,
          [curve[n][what] * factor for n in sizes],
          'o--' if run == 'step' else 'o-',
          color=colors[name],
          label=f'{name}, {run}',
          markersize=3,
        )
      panel.set_xscale('log', base=2)
      panel.set_yscale('log')
      panel.set_xlabel(study)
      panel.set_ylabel(f'{what.partition("_")[0]}, {unit}')
      panel.grid(alpha=0.3)
    axes[0, column].legend(fontsize=6)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def write(records: list[dict], folder: pathlib.Path) -> None:
  """Writes growth.md and growth.png."""
  (folder / 'growth.md').write_text(table(records))
  try:
    plot(records, folder / 'growth.png')
  except ImportError:  # matplotlib is no dependency of a run
    print('growth.png: needs matplotlib')
