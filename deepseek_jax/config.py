"""Frozen dataclass trees to and from editable dicts, strictly checked.

Experiments edit `ml_collections.ConfigDict`s; the library takes frozen
dataclasses. An unknown or ill-typed field is an InputError that names the
field and its nearest match. A field that may hold one of several dataclasses
(an attention) carries the chosen one's name under 'kind'.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from deepseek_jax.errors import InputError


def kind_name(cls: type) -> str:
  """'mla' for MLAConfig."""
  return cls.__name__.removesuffix('Config').lower()


def _members(annotation) -> tuple:
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return typing.get_args(annotation)
  return (annotation,)


def _classes(annotation) -> list[type]:
  return [c for c in _members(annotation) if dataclasses.is_dataclass(c)]


def optional_fields(cls: type) -> dict[str, type]:
  """Fields of a dataclass that may be None -> `str`, or `object` for others.

  A text is told from a number by its field alone: '17' may be a folder's name.
  Nothing for what is no dataclass.
  """
  if not dataclasses.is_dataclass(cls):
    return {}
  out = {}
  for name, hint in typing.get_type_hints(cls).items():
    members = set(_members(hint))
    if type(None) in members:
      out[name] = str if members == {str, type(None)} else object
  return out


def to_dict(config) -> dict[str, Any]:
  """A dataclass tree as nested plain dicts (JSON values and tuples)."""
  hints = typing.get_type_hints(type(config))
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    out[field.name] = _plain(value)
    if dataclasses.is_dataclass(value) and len(_classes(hints[field.name])) > 1:
      out[field.name] = {'kind': kind_name(type(value)), **out[field.name]}
  return out


def _plain(value):
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_plain(v) for v in value)
  return value


def from_dict(cls: type, values: Mapping, path: str = ''):
  """The dataclass `cls` from nested mappings; `path` prefixes messages."""
  hints = typing.get_type_hints(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      raise InputError(_unknown(path, key, names, cls))
  made = {
    key: _value(hints[key], value, f'{path}{key}')
    for key, value in values.items()
  }
  missing = [
    f.name
    for f in dataclasses.fields(cls)
    if f.name not in made
    and f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise InputError(f'{path}{missing[0]}: missing; {cls.__name__} needs it')
  try:
    return cls(**made)
  except InputError as error:
    where = path.rstrip('.')
    if not where or str(error).startswith(path):
      raise
    raise InputError(f'{where}: {error}') from None


def _unknown(path, key, names, cls):
  near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
  hint = f'did you mean {path}{near[0]}?' if near else f'fields: {names}'
  return f'{path}{key}: no such field in {cls.__name__}; {hint}'


def _value(annotation, value, path):
  if value is None and type(None) in _members(annotation):
    return None
  classes = _classes(annotation)
  if classes and isinstance(value, Mapping):
    return _choose(classes, dict(value), path)
  if classes and isinstance(value, tuple(classes)):
    return value
  origin = typing.get_origin(annotation)
  if origin is dict and isinstance(value, Mapping):
    _, inner = typing.get_args(annotation)
    return {k: _value(inner, v, f'{path}.{k}') for k, v in value.items()}
  return _scalar(annotation, value, path)


def _choose(classes, value, path):
  if len(classes) == 1:
    return from_dict(classes[0], value, f'{path}.')
  by_kind = {kind_name(c): c for c in classes}
  kind = value.pop('kind', None)
  if kind not in by_kind:
    raise InputError(f'{path}.kind = {kind!r}: must be one of {list(by_kind)}')
  return from_dict(by_kind[kind], value, f'{path}.')


def _scalar(annotation, value, path):
  wanted = [m for m in _members(annotation) if not dataclasses.is_dataclass(m)]
  for member in wanted:
    if typing.get_origin(member) is Literal:
      if value in typing.get_args(member):
        return value
      choices = list(typing.get_args(member))
      raise InputError(f'{path} = {value!r}: must be one of {choices}')
    if member is float and type(value) is int:
      return float(value)
    if member is tuple and isinstance(value, list | tuple):
      return _plain(value)
    if typing.get_origin(member) is tuple and isinstance(value, list | tuple):
      return _plain(value)
    if isinstance(member, type) and type(value) is member:
      return value
  names = [getattr(m, '__name__', str(m)) for m in _members(annotation)]
  raise InputError(
    f'{path} = {value!r}: is {type(value).__name__}, must be'
    f' {" or ".join(names)}'
  )


@functools.cache
def _choices(cls: type) -> dict[str, tuple]:
  """Fields that must hold one of a few values -> those values."""
  out = {}
  for name, hint in typing.get_type_hints(cls).items():
    members = _members(hint)
    some = [m for m in members if typing.get_origin(m) is Literal]
    if some and all(m in some or m is type(None) for m in members):
      none = (None,) * (len(some) < len(members))
      out[name] = sum(map(typing.get_args, some), none)
  return out


def check_choices(config, path: str = '') -> None:
  """Checks the fields of a dataclass tree that have choices.

  Python does not: a misspelt 'sgmoid' would silently be whatever comes last.

  Raises:
    InputError: a field has none of its values.
  """
  for name, allowed in _choices(type(config)).items():
    value = getattr(config, name)
    if value not in allowed:
      raise InputError(
        f'{path}{name} = {value!r}: must be one of {list(allowed)}'
      )
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    inner = value.items() if isinstance(value, Mapping) else [('', value)]
    for key, one in inner:
      if dataclasses.is_dataclass(one):
        check_choices(one, f'{path}{field.name}.{key}{key and "."}')


def changed(config, changes: Mapping[str, Any]):
  """A copy of `config` with dotted fields changed.

  changed(config, {'moe.router.scoring': 'softmax'}) is an ablation.
  """
  for path, value in changes.items():
    config = _changed(config, path.split('.'), value, path)
  return config


def _changed(config, parts, value, path):
  if isinstance(config, Mapping):
    inner = config.get(parts[0])
    new = _changed(inner, parts[1:], value, path) if parts[1:] else value
    return {**config, parts[0]: new}
  if not dataclasses.is_dataclass(config):
    raise InputError(f'{path}: {parts[0]} is a field of {config!r}')
  names = [f.name for f in dataclasses.fields(config)]
  if parts[0] not in names:
    raise InputError(_unknown('', path, names, type(config)))
  if parts[1:]:
    value = _changed(getattr(config, parts[0]), parts[1:], value, path)
  else:
    hints = typing.get_type_hints(type(config))
    value = _value(hints[parts[0]], value, path)
  return dataclasses.replace(config, **{parts[0]: value})
