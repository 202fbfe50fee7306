"""Writes what rounds of self-improvement reached: a table and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.record.report import curves as figures
from deepseek_jax.record.report import page, r1_page


def rounds(folder: Path) -> list[dict[str, Any]]:
  """Returns the records of the start and of every round that has ended."""
  return [r for r in r1_page.records(folder) if 'accuracy' in r]


def table(made: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Returns a row of texts for the start and every round."""
  levels = list(made[0]['accuracy'])
  return [
    {
      'round': record['name'].removeprefix('round-'),
      'level': str(record.get('level', '')),
      'drawn': f'{record["drawn"]:,}' if 'drawn' in record else '',
      'right': f'{record["right"]:,}' if 'right' in record else '',
      'kept': f'{record["kept"]:,}' if 'kept' in record else '',
      **{f'level {l}': f'{100 * record["accuracy"][l]:.1f} %' for l in levels},
    }
    for record in made
  ]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
  """Returns rows of texts as a table of Markdown."""
  head = list(rows[0])
  lines = [head, ['---'] * len(head), *(list(row.values()) for row in rows)]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


@figures.drawn
def picture(made: Sequence[Mapping[str, Any]], bar: float) -> Any:
  """Draws the held-out accuracy of every level over the rounds."""
  figure, cells = figures.grid([3.0], 1)
  axes = figure.add_subplot(cells[0])
  places = np.arange(len(made))
  for level, color in zip(made[0]['accuracy'], figures.COLORS * len(made)):
    values = [record['accuracy'][level] for record in made]
    low, high = zip(*(record['interval'][level] for record in made))
    axes.plot(
      places, values, color=color, marker='o', markersize=3.5, linewidth=1.3,
      label=f'level {level}  {100 * values[-1]:.0f} %',
    )  # fmt: skip
    axes.fill_between(places, low, high, color=color, alpha=0.1, linewidth=0)
  axes.axhline(bar, color='#9aa0a8', linewidth=0.8, linestyle=':')
  axes.set_title('Held-out accuracy by level')
  axes.set_ylim(-0.02, 1.02)
  axes.grid(axis='y')
  figures.step_axis(axes, bins=12)
  axes.set_xlabel('round')
  axes.legend(frameon=False, handlelength=1.2, fontsize=8)
  return figure


def write(folder: Path) -> Path:
  """Writes `evolve.html` and `evolve.md` from what there is; returns the page.

  Raises:
    InputError: nothing has ended.
  """
  made = rounds(folder)
  recipe = json.loads((folder / 'recipe.json').read_text('utf-8'))
  rows = table(made)
  text = (
    page.environment()
    .get_template('evolve.html.jinja')
    .render(
      title=f'Self-improvement: {folder.resolve().name}',
      verified=recipe['verify'],
      bar=f'{100 * recipe["bar"]:.0f} %',
      rows=rows,
      figure=picture(made, recipe['bar']),
      samples=made[-1]['samples'],
      last=made[-1]['name'],
      minutes=f'{sum(r["seconds"] for r in r1_page.records(folder)) / 60:.1f}',
    )
  )
  with files.whole(folder / 'evolve.md') as scratch:
    scratch.write_text(markdown(rows), 'utf-8')
  path = folder / 'evolve.html'
  with files.whole(path) as scratch:
    scratch.write_bytes(text.encode('utf-8', 'backslashreplace'))
  return path
