"""Makes the arms of a sweep: every combination of its axes, with every seed."""

import ast
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from deepseek_jax import config_changes
from deepseek_jax.cli import common, kinds
from deepseek_jax.errors import InputError
from deepseek_jax.plan import match as matching
from deepseek_jax.run.config import RunConfig

_NAME = re.compile(r'[^\w.=+-]+')


class ArmRun(NamedTuple):
  """Describes a run of a sweep.

  Attributes:
    name: of its folder.
    config: of the run.
    note: what was changed to match it with the first arm; '' if nothing was.
  """

  name: str
  config: RunConfig
  note: str


def axis(text: str) -> tuple[str, list[Any]]:
  """Returns field and values of 'field=a,b'; commas in brackets part nothing.

  Raises:
    InputError: there is no field, no value, or a value twice.
  """
  field, equals, values = text.partition('=')
  field = field.strip().removeprefix('config.')
  parts, depth, current = [], 0, ''
  for char in values:
    depth += (char in '([{') - (char in ')]}')
    if char == ',' and not depth:
      parts.append(current)
      current = ''
    else:
      current += char
  parts = [part.strip() for part in [*parts, current]]
  if not field or not equals or '' in parts or depth:
    raise InputError(f'--axis={text}: write field=value,value')
  if len(set(parts)) < len(parts):
    raise InputError(f'--axis={text}: names a value twice')
  if field in ('seed', 'data.seed'):
    raise InputError(f'--axis={text}: seeds are drawn by --seeds=N')
  return field, [_literal(part) for part in parts]


def _literal(text: str) -> Any:
  """Returns text as a Python literal, or itself."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def changed(
  base: config_dict.ConfigDict, point: Sequence[tuple[str, Any]]
) -> RunConfig:
  """Returns the run of one point of the axes.

  Raises:
    InputError: there is no such field or kind, or the run makes no sense.
  """
  config = config_dict.ConfigDict(
    base, convert_dict=False
  ).copy_and_resolve_references()
  run = common.frozen(RunConfig, config)
  switches, fields = [], {}
  for field, value in point:
    path = field.removesuffix('.kind')
    if path != field and kinds.choices(path):
      switches.append((path, str(value)))
    else:
      fields[field] = value
  if switches:
    edited = common.editable(run)
    kinds.apply(edited, switches, common.editable, lambda line: None)
    run = common.frozen(RunConfig, edited)
  return _with(run, fields)


def _with(run: RunConfig, fields: dict[str, Any]) -> RunConfig:
  """Returns a run with fields changed, an int where a float is wanted too."""
  return config_changes.changed(run, fields) if fields else run


def _folder(point: Sequence[tuple[str, Any]], seed: int) -> str:
  """Returns the name of a run's folder: 'scoring=softmax-seed=0'."""
  parts = [f'{".".join(f.split(".")[-2:])}={v}' for f, v in point]
  return _NAME.sub('_', '-'.join([*parts, f'seed={seed}']))


def runs(
  base: config_dict.ConfigDict,
  axes: Sequence[tuple[str, list]],
  seeds: int,
  match: str | None,
  knob: str,
) -> list[ArmRun]:
  """Returns every run of a sweep, arm by arm; all of them are checked.

  Args:
    base: a run's ConfigDict.
    axes: fields and their values.
    seeds: how many runs an arm has; seed s also orders the data.
    match: what every arm shall have as much of as the first, or None.
    knob: by what it is matched, 'width' or 'depth'.

  Raises:
    InputError: an arm makes no sense or can't be matched; or two have one name.
  """
  if seeds < 1:
    raise InputError(f'--seeds={seeds}: must be at least 1')
  points = itertools.product(*([(f, v) for v in vs] for f, vs in axes))
  out, first = [], None
  for point in points:
    where = ', '.join(f'{f}={v}' for f, v in point)
    note = ''
    try:
      config = changed(base, point)
      first = first or config
      if match:
        config, note = matching.matched_run(config, first, match, knob)
    except InputError as error:
      raise InputError(f'arm {where}: {error}') from None
    for number in range(seeds):
      seed = {
        'seed': first.seed + number,
        'data.seed': first.data.seed + number,
      }
      name = _folder(point, seed['seed'])
      out.append(ArmRun(name, config_changes.changed(config, seed), note))
  names = [run.name for run in out]
  if len(set(names)) < len(names):
    raise InputError('--axis: two arms have one name; name other fields')
  return out
