"""Compares runs: arms, their seeds, differences paired by seed, intervals.

Runs whose configurations differ in nothing but `seed` and `data.seed` are the
seeds of one arm. An interval is Student's t over seeds, 95 %; one seed has
none.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import files
from deepseek_jax.errors import InputError, told
from deepseek_jax.record import metrics, results

_SEEDS = ('seed', 'data.seed')
# Say where a run lies and how it is kept; no arm differs by them.
_NO_ARM = ('code', 'keep', 'checkpoint_every', 'tensorboard', 'data.cache_dir')


class Interval(NamedTuple):
  """Holds a mean over seeds and what it may be off by, None for one seed."""

  mean: float
  half: float | None
  count: int

  def __str__(self) -> str:
    """Returns mean and half width, to the digits that mean something."""
    if self.half is None or not math.isfinite(self.mean):
      return f'{self.mean:.4g}'
    digits = 3
    if self.half:
      digits = min(max(0, 1 - math.floor(math.log10(self.half))), 9)
    return f'{self.mean:.{digits}f} ± {self.half:.{digits}f}'


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Holds what a run's folder says.

  Attributes:
    path: of the folder.
    config: dotted field -> value.
    results: of results.json, or None: the run has not ended.
    curves: metric -> (steps, values).
  """

  path: Path
  config: dict[str, Any]
  results: dict[str, Any] | None
  curves: dict[str, tuple[np.ndarray, np.ndarray]]

  @property
  def seed(self) -> tuple:
    """Returns the seeds of weights and data, by which runs are paired."""
    return tuple(self.config.get(name) for name in _SEEDS)


@dataclasses.dataclass(frozen=True)
class Arm:
  """Holds the runs of one configuration, a run for each seed."""

  name: str
  runs: tuple[RunFolder, ...]


def interval(values: Sequence[float]) -> Interval:
  """Returns mean and 95 % interval of independent values.

  Raises:
    InputError: there is no value.
  """
  array, n = np.asarray(values, np.float64), len(values)
  if not n:
    raise InputError('values: there are none; give at least one')
  if n < 2:
    return Interval(float(array.mean()), None, n)
  from scipy.special import stdtrit

  spread = float(array.std(ddof=1)) / math.sqrt(n)
  return Interval(float(array.mean()), float(stdtrit(n - 1, 0.975)) * spread, n)


def _flat(tree: Any, path: str = '') -> dict[str, Any]:
  """Returns the leaves of nested dicts by dotted path."""
  if not isinstance(tree, dict) or not tree:
    return {path: json.dumps(tree)} if isinstance(tree, list) else {path: tree}
  out = {}
  for name, value in tree.items():
    out |= _flat(value, f'{path}.{name}'.removeprefix('.'))
  return out


def read(
  folder: Path, fill: Callable[[dict], dict] = lambda config: config
) -> RunFolder:
  """Returns what a run's folder holds.

  Args:
    folder: of the run.
    fill: gives a config.json the fields that came after it.

  Raises:
    InputError: it is no run's.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise InputError(f'{folder}: holds no run (no config.json); name runs')
  rows: dict[str, list] = {}
  for row in [*metrics.read(folder), *metrics.read(folder, 'timings')]:
    for name, value in row.items():
      if name != 'step':
        rows.setdefault(name, []).append((row['step'], value))
  curves = {
    name: (np.array([s for s, _ in p]), np.array([v for _, v in p], float))
    for name, p in rows.items()
  }
  config = _flat(fill(files.load_json(str(path))))
  return RunFolder(folder, config, results.read(folder), curves)


def folders(given: Sequence[str]) -> list[Path]:
  """Returns the runs' folders of paths: those of runs, or that hold runs.

  Raises:
    InputError: a path is no folder, or holds no run.
  """
  out = []
  for name in given:
    path = Path(name)
    if not path.is_dir():
      raise InputError(f'{name}: is no folder; name runs, or a folder of runs')
    inside = sorted(p.parent for p in path.glob('*/config.json'))
    found = [path] if (path / 'config.json').exists() else inside
    if not found:
      raise InputError(f'{name}: holds no run (no config.json)')
    out += found
  return list(dict.fromkeys(out))


def arms(entries: Sequence[RunFolder]) -> list[Arm]:
  """Returns the arms of runs, each named by the fields in which they differ.

  Raises:
    InputError: two runs of an arm have the same seeds.
  """
  ignored = lambda n: (
    n in (*_SEEDS, *_NO_ARM) or n.startswith(('safety.', 'code.'))
  )
  told = [
    {n: v for n, v in e.config.items() if not ignored(n)} for e in entries
  ]
  groups: dict[str, list[RunFolder]] = {}
  for entry, config in zip(entries, told):
    groups.setdefault(json.dumps(config, sort_keys=True), []).append(entry)
  every = {name for config in told for name in config}
  absent = 'absent'
  differ = [
    name
    for name in sorted(every)
    if len({json.dumps(config.get(name, absent)) for config in told}) > 1
  ]
  out = []
  for key, runs in groups.items():
    seeds = [run.seed for run in runs]
    twice = [r for r in runs if seeds.count(r.seed) > 1]
    if twice:
      raise InputError(
        f'{twice[0].path} and {twice[1].path}: are the same run with the same'
        ' seeds; name one of them'
      )
    config = json.loads(key)
    out.append(Arm(_label(differ, config), tuple(runs)))
  return _distinct(out)


def _label(differ: Sequence[str], config: dict) -> str:
  """Returns what tells an arm from the others: 'router.scoring=softmax'."""
  # A kind stands for the fields that come with it.
  kinds = {n.removesuffix('kind') for n in differ if n.endswith('.kind')}
  parts = []
  for name in differ:
    below = any(name.startswith(k) and name != f'{k}kind' for k in kinds)
    if not below and name in config:
      short = '.'.join(name.split('.')[-2:])
      parts.append(f'{short}={config[name]}')
  return ', '.join(parts)


def _distinct(found: list[Arm]) -> list[Arm]:
  """Returns the arms with names that no two share."""
  names = [arm.name for arm in found]
  return [
    dataclasses.replace(arm, name=arm.runs[0].path.name)
    if not arm.name or names.count(arm.name) > 1
    else arm
    for arm in found
  ]


def value(entry: RunFolder, metric: str) -> float | None:
  """Returns the last value of a metric, None if the run has none.

  Raises:
    InputError: `entry` is no run.
  """
  if not isinstance(entry, RunFolder):
    raise InputError(f'entry: is {told(entry)}; give a run of ds.read_arms')
  held = (entry.results or {}).get('heldout')
  if metric == 'heldout_bits_per_byte' and held:
    return float(held['bits_per_byte'])  # 'nan' of a run that diverged
  if metric not in entry.curves:
    return None
  return float(entry.curves[metric][1][-1])


def check_metric(entries: Sequence[RunFolder], metric: str) -> None:
  """Raises InputError where no run has a metric."""
  if any(value(entry, metric) is not None for entry in entries):
    return
  known = sorted({name for entry in entries for name in entry.curves})
  raise InputError(
    f'metric = {metric!r}: no run has it; they have'
    f' {", ".join(known) or "none"}'
  )


class Difference(NamedTuple):
  """Holds by how much an arm's metric lies above that of the first arm."""

  name: str
  interval: Interval
  verdict: str


def differences(found: Sequence[Arm], metric: str) -> list[Difference]:
  """Returns each later arm less the first, paired by seed.

  Raises:
    InputError: no run has the metric.
  """
  check_metric([run for arm in found for run in arm.runs], metric)
  values = lambda arm: {
    run.seed: v for run in arm.runs if (v := value(run, metric)) is not None
  }
  first, out = values(found[0]), []
  for arm in found[1:]:
    mine = values(arm)
    both = [seed for seed in mine if seed in first]
    if not both:
      continue
    made = interval([mine[seed] - first[seed] for seed in both])
    if made.half is None:
      verdict = 'one seed: it may be noise'
    elif not math.isfinite(made.mean):
      verdict = 'a run diverged'
    elif abs(made.mean) <= made.half:
      verdict = 'not told from 0'
    else:
      verdict = 'higher' if made.mean > 0 else 'lower'
    out.append(Difference(arm.name, made, verdict))
  return out


def cautions(found: Sequence[Arm]) -> list[str]:
  """Returns lines on what makes the arms hard to compare."""
  runs = [run for arm in found for run in arm.runs]
  out = [
    f'{run.path}: has not ended (no {results.FILE})'
    for run in runs
    if not run.results
  ]
  ended = [run.results for run in runs if run.results]
  if len({r['data']['heldout_sha256'] for r in ended}) > 1:
    out.append('held-out tokens differ: bits per byte are of other texts')
  for name, unit in (('tokens', 'training tokens'),):
    each = sorted({r[name] for r in ended})
    if len(each) > 1:
      out.append(f'{unit} differ: {each[0]:,} to {each[-1]:,}')
  for name, get in (
    ('active parameters', lambda r: r['parameters']['active']),
    ('training FLOPs', lambda r: (r['flops'] or {}).get('training')),
  ):
    each = sorted({n for r in ended if (n := get(r))})
    if each and each[-1] > 1.02 * each[0]:
      out.append(
        f'{name} differ by {100 * (each[-1] / each[0] - 1):.0f} %:'
        f' {each[0]:,.4g} to {each[-1]:,.4g} (see sweep --match)'
      )
  return out


def table(found: Sequence[Arm], metric: str) -> list[dict[str, str]]:
  """Returns a row of texts for each arm."""
  out = []
  for arm in found:
    values = [v for run in arm.runs if (v := value(run, metric)) is not None]
    ended = [run.results for run in arm.runs if run.results]
    mean = lambda get, ended=ended: _mean(get, ended)
    out.append(
      {
        'arm': arm.name,
        'seeds': str(len(arm.runs)),
        metric: str(interval(values)) if values else '—',
        'tokens': mean(lambda r: r['tokens']),
        'parameters': mean(lambda r: r['parameters']['total']),
        'active': mean(lambda r: r['parameters']['active']),
        'FLOPs': mean(lambda r: (r['flops'] or {}).get('training')),
        'tokens/s': mean(lambda r: r['tokens_per_second']),
        'seconds': mean(lambda r: r['seconds']),
        'peak MiB': mean(lambda r: (r['peak_memory_bytes'] or 0) / 2**20),
      }
    )
  return out


def _mean(get: Any, ended: Sequence[dict]) -> str:
  """Returns the mean of a result over the runs that have it, as text."""
  values = [v for r in ended if (v := get(r))]
  if not values:
    return '—'
  mean = float(np.mean(values))
  return f'{mean:,.0f}' if 1e2 <= mean < 1e9 else f'{mean:.3g}'
