"""Writes what rounds of self-improvement reached: a table and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.record.report import curves, page, r1_page


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


def picture(made: Sequence[Mapping[str, Any]]) -> curves.Chart:
  """Returns a chart: the held-out accuracy of every level over the rounds."""
  places, lines = np.arange(len(made), dtype=float), []
  for level in made[0]['accuracy']:
    values = np.array([record['accuracy'][level] for record in made])
    low, high = np.array([record['interval'][level] for record in made]).T
    last = f'{100 * values[-1]:.0f} %'
    label = f'level {level}'
    lines.append(curves.Curve(label, places, values, low, high, last))
  return curves.chart('Share solved', lines, most=curves.WIDE)


def write(folder: Path) -> Path:
  """Writes `evolve.html` and `evolve.md` from what there is; returns the page.

  Raises:
    InputError: nothing has ended.
  """
  made = rounds(folder)
  recipe = json.loads((folder / 'recipe.json').read_text('utf-8'))
  rows = table(made)
  with files.whole(folder / 'evolve.md') as scratch:
    scratch.write_text(markdown(rows), 'utf-8')
  return page.write(
    folder / 'evolve.html',
    'evolve.html.jinja',
    title=f'Self-improvement: {folder.resolve().name}',
    verified=recipe['verify'],
    bar=f'{100 * recipe["bar"]:.0f} %',
    names=list(rows[0]),
    rows=[list(row.values()) for row in rows],
    figure=picture(made),
    samples=[
      (one['prompt'], one['text'], '✓' if one['right'] else '✗')
      for one in made[-1]['samples']
    ],
    last=made[-1]['name'],
    minutes=f'{sum(r["seconds"] for r in r1_page.records(folder)) / 60:.1f}',
  )
