"""Writes the page of a small R1: one HTML file, from what its stages left.

Every figure is of a file in the folder: `stages/*.json` of the stages that have
ended, `metrics.jsonl` and `routing.npz` of the runs, `recipe.json`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import files
from deepseek_jax.errors import InputError
from deepseek_jax.record import flight, load_balance, metrics
from deepseek_jax.record.report import curves, expert_figures, page

_MEASURED = '-measured'
# Metric -> title and unit; drawn where a run has it, in this order.
_CURVES = {
  'reward': ('Reward', 'mean of a round'),
  'heldout_reward': ('Held-out reward', 'greedy'),
  'answer_length': ('Response length', 'tokens'),
  'policy_entropy': ('Entropy', 'nats per token'),
  'kl': ('KL to the start', 'nats per token'),
  'clipped_high': ('Clipped above', 'share of tokens'),
  'clipped_low': ('Clipped below', 'share of tokens'),
  'equal_groups': ('Groups with equal rewards', 'share'),
  'truncated': ('Cut at the limit', 'share'),
  'mismatch': ('Sampler vs trainer', 'nats'),
  'verifier_errors': ('Verifier errors', 'answers'),
  'grad_norm': ('Gradient norm', ''),
}


def records(folder: Path) -> list[dict[str, Any]]:
  """Returns what the stages that have ended left, in their order.

  Raises:
    InputError: none has.
  """
  found = [
    files.load_json(str(p)) for p in sorted((folder / 'stages').glob('*.json'))
  ]
  # A study keeps its arms beside the stages that they begin with.
  made = [record for record in found if record['kind'] != 'arm']
  if not made:
    raise InputError(f'{folder}: no stage has ended; there is nothing to show')
  return sorted(made, key=lambda record: record['number'])


def write(folder: Path) -> Path:
  """Writes `r1.html` from what there is; returns its path."""
  made = records(folder)
  scored = {
    r['name'].removesuffix(_MEASURED): r for r in made if r['kind'] == 'measure'
  }
  runs = [r['name'] for r in made if r['kind'] == 'run']
  # A run's folder may have been removed since it ended.
  there = [name for name in runs if (folder / name).is_dir()]
  rows = {name: metrics.read(folder / name) for name in there}
  reinforced = {
    name: some
    for name, some in rows.items()
    if any('reward' in r for r in some)
  }
  return page.write(
    folder / 'r1.html',
    'r1.html.jinja',
    title=f'R1 in small: {folder.resolve().name}',
    facts=_facts(made, scored, reinforced),
    stages=[_stage_row(record) for record in made],
    total=_clock(sum(record['seconds'] for record in made)),
    kinds=_kinds(scored),
    ladder=_ladder(scored),
    curves=_curves(reinforced),
    experts=[
      found
      for name in reinforced
      if (found := _experts(name, folder / name / 'routing.npz'))
    ],
    samples=_samples(scored, reinforced),
    exports=_exports(made),
    recipe=(folder / 'recipe.json').read_text('utf-8'),
  )


def _clock(seconds: float) -> str:
  """Returns seconds as 12:05 minutes."""
  return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def _percent(share: float) -> str:
  """Returns a share in percent."""
  return f'{100 * share:.1f} %'


def _facts(
  made: Sequence[Mapping], scored: Mapping[str, Mapping], reinforced: Mapping
) -> list[tuple[str, str, str]]:
  """Returns what to know first: name, value, and what stands below it."""
  out = []
  names = list(scored)
  start = _before(names, next(iter(reinforced), None))
  last = [name for name in names if name in reinforced][-1:]
  if start and last:
    for kind, before in scored[start]['kinds'].items():
      after = scored[last[0]]['kinds'][kind]
      out.append(
        (
          f'{kind}, greedy',
          f'{_percent(before["greedy"])} → {_percent(after["greedy"])}',
          f'held out, {start} to {last[0]}',
        )
      )
    for k in scored[start]['pass']:
      if k in ('1', '16'):
        shares = [scored[n]['pass'][k] for n in (start, last[0])]
        told = ' → '.join(map(_percent, shares))
        out.append((f'pass@{k}', told, 'held out, all problems'))
  for record in made:
    for name, one in record.get('folders', {}).items():
      told = f'{one["equal"]} of {one["compared"]}'
      out.append(
        (f'{name} in transformers', told, one.get('note', 'equal answers'))
      )
  out.append(('minutes', _clock(sum(r['seconds'] for r in made)), 'all stages'))
  return out


def _before(names: Sequence[str], name: str | None) -> str | None:
  """Returns the measured stage before another; None without one."""
  at = names.index(name) if name in names else 0
  return names[at - 1] if at else None


def _stage_row(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
  """Returns a row of the table of stages."""
  told = {
    'run': lambda r: f'{r["steps"]:,} steps, {r["tokens"]:,} tokens',
    'measure': lambda r: (
      f'{r["problems"]} problems, {_percent(r["greedy"])} right'
    ),
    'file': _file_words,
  }
  did = told.get(record['kind'], _file_words)(record)
  return record['name'], record['what'], did, _clock(record['seconds'])


def _file_words(record: Mapping[str, Any]) -> str:
  """Returns what a stage of files made, in a few words."""
  if 'kept' in record:
    return f'{record["kept"]:,} kept of {record["drawn"]:,} answers'
  if 'conversations' in record:
    return (
      f'{record["problems"]:,} problems, {record["heldout"]:,} held out,'
      f' {record["conversations"]:,} conversations'
    )
  if 'folders' in record:
    return ', '.join(record['folders'])
  return ''


def _kinds(
  scored: Mapping[str, Mapping],
) -> list[tuple[str, list[str], list[list[str]]]]:
  """Returns (kind, heads, rows) of the tables of held-out accuracies."""
  out = []
  for kind in dict.fromkeys(k for r in scored.values() for k in r['kinds']):
    rows = [
      _score_row(name, record['kinds'][kind])
      for name, record in scored.items()
      if kind in record['kinds']
    ]
    out.append((kind, list(rows[0]), [list(row.values()) for row in rows]))
  return out


def _score_row(name: str, one: Mapping[str, Any]) -> dict[str, str]:
  """Returns a row: what a model reached on one kind of problems."""
  low, high = one['greedy_interval']
  tries = {f'pass@{k}': _percent(share) for k, share in one['pass'].items()}
  return {
    'model': name,
    'greedy': _percent(one['greedy']),
    '95 %': f'{100 * low:.0f}–{100 * high:.0f}',
    **tries,
    'in form': _percent(one['in_form']),
    'tokens': f'{one["length"]:.1f}',
    'cut': _percent(one['truncated']),
    'problems': str(one['problems']),
  }


def _ladder(scored: Mapping[str, Mapping]) -> list[curves.Chart]:
  """Returns a chart for each kind: held-out accuracy after every stage."""
  out = []
  for kind in dict.fromkeys(k for r in scored.values() for k in r['kinds']):
    names = [name for name, r in scored.items() if kind in r['kinds']]
    some = [scored[name]['kinds'][kind] for name in names]
    steps = np.array([int(name.partition('-')[0]) for name in names], float)
    low, high = np.array([one['greedy_interval'] for one in some]).T
    greedy = np.array([one['greedy'] for one in some])
    lines = [_line('greedy', steps, greedy, low, high)]
    for k in ('1', '16'):
      if all(k in one['pass'] for one in some):
        share = np.array([one['pass'][k] for one in some])
        lines.append(_line(f'pass@{k}', steps, share, share, share))
    out.append(curves.chart(f'{kind}, share solved', lines))
  return out


def _line(
  label: str,
  steps: np.ndarray,
  mean: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
) -> curves.Curve:
  """Returns a curve of shares, the last in percent."""
  return curves.Curve(label, steps, mean, low, high, _percent(mean[-1]))


def _curves(
  reinforced: Mapping[str, Sequence[Mapping]],
) -> list[curves.Chart]:
  """Returns the curves of all reinforcement over each other."""
  panels = []
  for name, (title, unit) in _CURVES.items():
    series = []
    for run, rows in reinforced.items():
      points = [(r['step'], r[name]) for r in rows if name in r]
      if points:
        steps, values = map(np.array, zip(*points))
        series.append(curves.Series(run, steps, values.astype(float)))
    if series:
      panels.append(curves.Panel(title, unit, series))
  return curves.charts(panels)


def _experts(name: str, path: Path) -> dict[str, Any] | None:
  """Returns the experts' load in the first and last rounds of a run."""
  if not path.exists():
    return None
  run = flight.load(path)
  if 'load' not in run.arrays:
    return None
  load = run.arrays['load'].astype(np.float64)
  some = max(1, len(load) // 10)
  halves = []
  for part, span in (('first', load[:some]), ('last', load[-some:])):
    total = span.sum(axis=0)
    share = total / np.maximum(total.mean(-1, keepdims=True), 1)
    worst = float(np.nanmax(load_balance.max_violation(total)))
    figure = expert_figures.load_by_layer(share, run.layers.tolist())
    halves.append({'part': part, 'figure': figure, 'worst': f'{worst:.2f}'})
  updates = int(some * run.records[0])
  return {'name': name, 'updates': updates, 'parts': halves}


def _samples(
  scored: Mapping[str, Mapping], reinforced: Mapping
) -> dict[str, Any] | None:
  """Returns answers of several models to the same problems, side by side."""
  names = list(scored)
  start = _before(names, next(iter(reinforced), None))
  chosen = [n for n in names if n == start or n in reinforced or n == names[-1]]
  if not chosen:
    return None
  rows: dict[str, dict] = {}
  for name in chosen:
    for one in scored[name]['samples']:
      rows.setdefault(one['prompt'], {})[name] = one
  shown = [
    (prompt, [by_name.get(name) for name in chosen])
    for prompt, by_name in rows.items()
  ]
  return {'models': chosen, 'rows': shown}


def _exports(made: Sequence[Mapping]) -> list[tuple[str, Mapping]]:
  """Returns the folders that transformers has read, with their examples."""
  return [item for record in made for item in record.get('folders', {}).items()]


def summary(folder: Path) -> str:
  """Returns the held-out accuracies as lines of text."""
  out = []
  for record in records(folder):
    if record['kind'] == 'measure':
      parts = [
        f'{kind} {_percent(one["greedy"])}'
        for kind, one in record['kinds'].items()
      ]
      out.append(f'{record["name"]}: {", ".join(parts)}')
  return '\n'.join(out)
