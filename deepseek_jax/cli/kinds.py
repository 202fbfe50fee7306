"""Switches kinds of a configuration's parts: --config.model.attention.kind=gqa.

The part becomes another class with the defaults of that class. What it has no
default for is taken from the part before: a field of the same name, or else a
shape that follows from heads and their width. One line says what came out.
objective.kind also takes the name of one of GRPO's presets.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax import config as configs
from deepseek_jax import own_classes
from deepseek_jax.errors import InputError
from deepseek_jax.rl.grpo import PRESETS, GRPOConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.run.config import RunConfig


def _classes_at(parts: list[str], classes: Iterable[type]) -> list[type]:
  """Returns the dataclasses that may stand at a path below some classes."""
  for part in parts:
    hints = [typing.get_type_hints(c).get(part) for c in classes]
    found = [c for h in hints if h is not None for c in configs.classes_of(h)]
    classes = list(dict.fromkeys(found))
  return list(classes)


def choices(path: str) -> list[type]:
  """Returns the classes among which `path`.kind chooses; [] if it is a field.

  train.schedule.kind is a field of its class, model.attention.kind chooses one.
  """
  classes = _classes_at(path.split('.'), [RunConfig])
  named = lambda c: 'kind' in {f.name for f in dataclasses.fields(c)}
  return [] if any(map(named, classes)) else classes


def taken(argv: list[str]) -> tuple[list[str], dict[str, list]]:
  """Takes the flags out that switch kinds.

  Returns:
    The other arguments, and flag -> pairs (path, kind), in order.
  """
  rest, found = [], {}
  for arg in joined(argv):
    key, equals, kind = arg.partition('=')
    flag, _, path = key.lstrip('-').partition('.')
    kind = kind.strip('\'"')
    # --config.model.attention=gqa means the kind, too; a dict is a value.
    named = path.endswith('.kind') or (kind.isidentifier() and kind != 'None')
    if equals and key.startswith('-') and path and named:
      path = path.removesuffix('.kind')
      if flag in ('config', 'versus') and choices(path):
        found.setdefault(flag, []).append((path, kind))
        continue
    rest.append(arg)
  return rest, found


def joined(argv: list[str]) -> list[str]:
  """Returns flags with --config.FIELD VALUE as one argument, with a =."""
  out, rest = [], list(argv)
  while rest:
    arg = rest.pop(0)
    field = arg.lstrip('-').startswith(('config.', 'versus.'))
    alone = field and arg[:1] == '-' and '=' not in arg
    if alone and rest and rest[0][:2] != '--':
      arg = f'{arg}={rest.pop(0)}'
    out.append(arg)
  return out


def switched(path: str, kind: str, old: Any, dim: int) -> Any:
  """Returns the part of another kind in place of `old`.

  Args:
    path: of the part, for messages.
    kind: name of its class; 'None' where the part may be absent.
    old: the part before, or None.
    dim: width of the model.

  Raises:
    InputError: there is no such kind, or its shape can't be derived.
  """
  classes = {configs.kind_name(c): c for c in choices(path)}
  presets = list(PRESETS) if path == 'objective' else []
  flag = f'--config.{path}.kind={kind}'
  cls = own_classes.find(kind) if ':' in kind else classes.get(kind)
  if cls is None:
    what = 'no such dataclass is imported' if ':' in kind else 'no such kind'
    known = ', '.join([*classes, *presets])
    raise InputError(f'{flag}: {what}; kinds are {known}')
  needed = [
    f.name
    for f in dataclasses.fields(cls)
    if f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  ]
  derived = _shapes(old, dim)
  made = {n: getattr(old, n, derived.get(n)) for n in needed}
  missing = [n for n in needed if n not in derived and not hasattr(old, n)]
  if missing:
    fields = ''.join(f", '{n}': …" for n in needed)
    raise InputError(
      f'{flag}: {kind} has no default for {", ".join(missing)}; write'
      f" --config.{path}=\"{{'kind': '{kind}'{fields}}}\""
    )
  hints = typing.get_type_hints(cls)
  if made.get('q_rank', 0) is None and hints['q_rank'] is int:
    made['q_rank'] = derived['kv_rank']  # queries have to be compressed
  return cls(**made)


def _shapes(old: Any, dim: int) -> dict[str, Any]:
  """Returns shapes of attentions that follow from heads and their width.

  As in DeepSeek-V2: rotated parts are half as wide as the others, latents four
  times, and queries are not compressed.
  """
  heads = getattr(old, 'heads', None)
  if heads is None:
    return {}
  width = getattr(old, 'v_dim', None) or getattr(old, 'head_dim', dim // heads)
  even = max(width // 2 * 2, 2)
  return {
    'heads': heads,
    'kv_heads': heads,
    'head_dim': even,
    'qk_dim': even,
    'nope_dim': width,
    'rope_dim': max(even // 4 * 2, 2),
    'v_dim': width,
    'q_rank': None,
    'kv_rank': 4 * width,
    'o_rank': 4 * width,
    'groups': 1,
  }


def told(path: str, part: Any) -> str:
  """Returns a line on what a part has become."""
  numbers = [
    f'{f.name}={getattr(part, f.name)}'
    for f in dataclasses.fields(part)
    if not dataclasses.is_dataclass(getattr(part, f.name))
  ]
  return (
    f'config.{path} is {configs.kind_name(type(part))}: {", ".join(numbers)}'
  )


def _preset(name: str, config: Any) -> GRPOConfig:
  """Returns GRPO as a paper has it, for the longest answer of a config."""
  rollouts = config['rollouts']
  return PRESETS[name]((rollouts or RolloutConfig()).most)


def having(path: str, field: str) -> list[str]:
  """Returns the kinds of a part that have a field of this name."""
  return [
    configs.kind_name(c)
    for c in choices(path)
    if field in {f.name for f in dataclasses.fields(c)}
  ]


def apply(
  config: Any,
  switches: Iterable[tuple[str, str]],
  editable: Callable[[Any], Any],
  say: Callable[[str], None],
) -> None:
  """Switches kinds of parts of a ConfigDict, in place.

  Args:
    config: a run's or a plan's ConfigDict, locked.
    switches: pairs (path, kind).
    editable: makes a ConfigDict of a dataclass.
    say: takes a line for each part.
  """
  for path, kind in switches:
    *above, last = path.split('.')
    holder = config
    for name in above:
      holder = holder[name]
    if kind == 'None':
      holder[last] = None
      continue
    if path == 'objective' and kind in PRESETS:
      part, kind = _preset(kind, config), 'grpo'
    else:
      part = switched(path, kind, holder[last], config['model']['dim'])
    made = editable(part)
    with made.unlocked():
      if len(choices(path)) > 1 or ':' in kind:
        made['kind'] = kind
    with holder.unlocked():
      holder[last] = made
    say(told(path, part))
