"""Turns frozen dataclass trees into editable dicts and back, strictly checked.

Experiments edit `ml_collections.ConfigDict`s; the library takes frozen
dataclasses. An unknown or ill-typed field is an InputError that names the
field and its nearest match. A field that may hold one of several dataclasses
(an attention) carries the chosen one's name under 'kind'.
"""

import dataclasses
import difflib
import functools
import numbers
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import numpy as np

from deepseek_jax import own_classes
from deepseek_jax.errors import InputError

_LARGEST_INT = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)

field_types = functools.cache(typing.get_type_hints)


def kind_name(cls: type) -> str:
  """Returns the name of a config class under 'kind': 'mla' for MLAConfig."""
  return cls.__name__.removesuffix('Config').lower()


def alternatives(annotation: Any) -> tuple:
  """Returns the alternatives of an annotation, the only one if no union."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return typing.get_args(annotation)
  return (annotation,)


def classes_of(annotation: Any) -> list[type]:
  """Returns the dataclasses among the alternatives of an annotation."""
  return [c for c in alternatives(annotation) if dataclasses.is_dataclass(c)]


def optional_fields(cls: type) -> dict[str, type]:
  """Returns fields that may be None -> `str`, or `object` for others.

  A text differs from a number by its field alone: '17' may be a folder's name.
  Nothing for what is no dataclass.
  """
  if not dataclasses.is_dataclass(cls):
    return {}
  out = {}
  for name, hint in typing.get_type_hints(cls).items():
    members = set(alternatives(hint))
    if type(None) in members:
      out[name] = str if members == {str, type(None)} else object
  return out


def dtype_name(value: Any) -> Any:
  """Returns the name of a dtype, of jnp.float32 too; others as they are."""
  # jnp.float32 is a class that has one; np.float32 is a class of numbers.
  scalar = isinstance(value, type) and (
    hasattr(value, 'dtype') or issubclass(value, np.generic)
  )
  named = scalar or isinstance(value, np.dtype)
  return np.dtype(value).name if named else value


def name_dtypes(config: Any, *fields: str) -> None:
  """Sets fields of a frozen dataclass that hold a dtype to its name."""
  for field in fields:
    object.__setattr__(config, field, dtype_name(getattr(config, field)))


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a dataclass tree as nested plain dicts (JSON values and tuples)."""
  hints = field_types(type(config))
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    out[field.name] = _plain(value)
    kind = _kind(classes_of(hints[field.name]), value)
    if kind:
      out[field.name] = {'kind': kind, **out[field.name]}
  return out


def _kind(classes: list[type], value: Any) -> str | None:
  """Returns what names the class of a field's value.

  None where there is one class.
  """
  if not classes or not dataclasses.is_dataclass(value):
    return None
  cls = type(value)
  if cls not in classes:
    return f'{cls.__module__}:{cls.__qualname__}'
  # Fields tell one class from none; a class without fields needs its name.
  named = len(classes) > 1 or not dataclasses.fields(cls)
  return kind_name(cls) if named else None


def _plain(value: Any) -> Any:
  """Returns a field's value with dataclasses as dicts and lists as tuples."""
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_named(v) for v in value)
  return value


def _named(value: Any) -> Any:
  """Returns a tuple's item like `_plain`; a dataclass with its 'module:Class'.

  No field there has a type that names its class.
  """
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return _plain(value)
  cls = type(value)
  return {'kind': f'{cls.__module__}:{cls.__qualname__}', **to_dict(value)}


def _unnamed(value: Any, path: str) -> Any:
  """Inverts `_named`."""
  if isinstance(value, Mapping) and ':' in str(value.get('kind')):
    inner = dict(value)
    return from_dict(_imported(inner.pop('kind'), path), inner, f'{path}.')
  if isinstance(value, list | tuple):
    return tuple(_unnamed(v, path) for v in value)
  return value


def from_dict(cls: type, values: Mapping, path: str = '') -> Any:
  """Returns the dataclass `cls` of nested mappings, checked.

  Args:
    cls: a dataclass.
    values: field -> value, as `to_dict` gives them; absent fields have their
      defaults.
    path: prefixes the field in messages, as in 'model.'.

  Raises:
    InputError: a field is unknown, missing, ill-typed or out of range.
  """
  hints = field_types(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      raise InputError(unknown_field(path, key, names, cls))
  made = {
    key: typed(hints[key], value, f'{path}{key}')
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
    # The message may name its field or its place: name no part of a path twice.
    where = path.rstrip('.')
    above_it, _, last = where.rpartition('.')
    if not where or str(error).startswith(path):
      raise
    if str(error).startswith(f'{last}.'):
      raise InputError(f'{above_it}.{error}') from None
    raise InputError(f'{where}: {error}') from None


def unknown_field(path: str, key: Any, names: list[str], cls: type) -> str:
  """Returns the message for a field that does not exist, with a hint."""
  near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
  hint = f'did you mean {path}{near[0]}?' if near else f'fields: {names}'
  return f'{path}{key}: no such field in {cls.__name__}; {hint}'


def typed(annotation: Any, value: Any, path: str) -> Any:
  """Returns the value that a field holds, dataclasses made of mappings.

  Raises:
    InputError: it does not fit the annotation.
  """
  among = alternatives(annotation)
  if value is None and type(None) in among:
    return None
  # A flag of a text that may be absent gives no other None.
  if set(among) == {str, type(None)} and value == 'None':
    return None
  classes = classes_of(annotation)
  if classes and isinstance(value, Mapping):
    return _choose(classes, dict(value), path)
  if classes and _fits(classes, value):
    return value
  mapped = [m for m in alternatives(annotation) if typing.get_origin(m) is dict]
  if mapped and isinstance(value, Mapping):
    _, inner = typing.get_args(mapped[0])
    return {k: typed(inner, v, f'{path}.{k}') for k, v in value.items()}
  return _scalar(annotation, value, path)


def _fits(classes: list[type], value: Any) -> bool:
  """Returns whether a field of these dataclasses takes a value.

  A user's own dataclass fits where a module is built: if it has the methods
  that all of `classes` have, `build` among them.
  """
  if isinstance(value, tuple(classes)):
    return True
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return False
  shared = functools.reduce(set.intersection, map(_methods, classes))
  return 'build' in shared and shared <= _methods(type(value))


def _methods(cls: type) -> set[str]:
  """Returns the names of a class's public methods."""
  public = (name for name in dir(cls) if not name.startswith('_'))
  return {name for name in public if callable(getattr(cls, name))}


def _choose(classes: list[type], value: dict, path: str) -> Any:
  """Returns the one of several dataclasses that 'kind' names, of a mapping.

  Raises:
    InputError: there is no such kind, or its fields do not fit.
  """
  by_kind = {kind_name(c): c for c in classes}
  if ':' in str(value.get('kind')):
    own = _imported(value.pop('kind'), path)
    return typed(
      functools.reduce(operator.or_, classes),
      from_dict(own, value, f'{path}.'),
      path,
    )
  named = len(classes) > 1 or not dataclasses.fields(classes[0])
  if not named or (len(classes) == 1 and 'kind' not in value):
    return from_dict(classes[0], value, f'{path}.')
  kind = value.pop('kind', None)
  if kind not in by_kind:
    raise InputError(f'{path}.kind = {kind!r}: must be one of {list(by_kind)}')
  return from_dict(by_kind[kind], value, f'{path}.')


def _imported(kind: str, path: str) -> type:
  """Returns the user's dataclass 'module:Class'.

  Its module must be imported already: a file must not decide what code runs.

  Raises:
    InputError: it is not.
  """
  found = own_classes.find(str(kind))
  if found is None:
    module = str(kind).partition(':')[0]
    raise InputError(
      f'{path}.kind = {kind!r}: no such dataclass is imported; import {module}'
      ' before this is read'
    )
  return found


def _scalar(annotation: Any, value: Any, path: str) -> Any:
  """Returns a value that is no dataclass, an int as float where that is wanted.

  Raises:
    InputError: it is none of the annotation's types or choices.
  """
  among = alternatives(annotation)
  wanted = [m for m in among if not dataclasses.is_dataclass(m)]
  for member in wanted:
    if typing.get_origin(member) is Literal:
      value = dtype_name(value)
      if value in typing.get_args(member):
        return value
      choices = list(typing.get_args(member))
      raise InputError(f'{path} = {value!r}: must be one of {choices}')
    if member is float and type(value) is int:
      return float(value)
    whole = member is tuple or typing.get_origin(member) is tuple
    if whole and isinstance(value, list | tuple):
      return _unnamed(value, path)
    if isinstance(member, type) and type(value) is member:
      return value
  names = [getattr(m, '__name__', str(m)) for m in alternatives(annotation)]
  raise InputError(
    f'{path} = {value!r}: is {type(value).__name__}, must be'
    f' {" or ".join(names)}'
  )


@functools.cache
def _choices(cls: type) -> dict[str, tuple]:
  """Returns fields that must hold one of a few values -> those values."""
  out = {}
  for name, hint in typing.get_type_hints(cls).items():
    members = alternatives(hint)
    some = [m for m in members if typing.get_origin(m) is Literal]
    if some and all(m in some or m is type(None) for m in members):
      none = (None,) * (len(some) < len(members))
      out[name] = sum(map(typing.get_args, some), none)
  return out


def check_choices(config: Any, path: str = '') -> None:
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


def at_least(config: Any, prefix: str = '', **least: float) -> None:
  """Raises InputError unless each named field is finite and at least so much.

  at_least(self, heads=1, dropout=0); `prefix` goes before a field's name in
  the message: 'engram.'. An optional field may be None.
  """
  for name, low in least.items():
    number = _number(config, prefix, name)
    if number is not None and not number >= low:
      _refuse(config, prefix, name, f'must be at least {low}')


def above(config: Any, prefix: str = '', **below: float) -> None:
  """Raises InputError unless each named field is finite and above so much."""
  for name, low in below.items():
    number = _number(config, prefix, name)
    if number is not None and not number > low:
      _refuse(config, prefix, name, f'must be above {low}')


def within(
  config: Any,
  prefix: str = '',
  *,
  ends: str = '[]',
  **ranges: tuple[float, float],
) -> None:
  """Raises InputError unless each named field lies in its (low, high).

  A parenthesis in `ends` excludes that end, as in '[)'.
  """
  for name, (low, high) in ranges.items():
    number = _number(config, prefix, name)
    if number is None:
      continue
    inside = low <= number <= high
    outside = [x for x, end in zip((low, high), ends) if end in '()']
    if not inside or number in outside:
      less = f', {" and ".join(map(str, outside))} excluded' if outside else ''
      _refuse(config, prefix, name, f'must lie in {low}..{high}{less}')


def finite(config: Any, *names: str, prefix: str = '') -> None:
  """Raises InputError unless the named fields are finite numbers."""
  for name in names:
    _number(config, prefix, name)


def _refuse(config: Any, prefix: str, name: str, what: str) -> NoReturn:
  """Raises InputError for a field's value, with what it must be."""
  raise InputError(f'{prefix}{name} = {getattr(config, name)!r}: {what}')


def _number(config: Any, prefix: str, name: str) -> int | float | None:
  """Returns the field if it is a number that a device can hold; None for None.

  Raises:
    InputError: it is not, or it is None and not optional.
  """
  value = getattr(config, name)
  members = alternatives(field_types(type(config))[name])
  if value is None and type(None) in members:
    return None
  whole = float not in members
  kind = numbers.Integral if whole else numbers.Real
  if isinstance(value, bool) or not isinstance(value, kind):
    what = 'a whole number' if whole else 'a number'
    _refuse(config, prefix, name, f'must be {what}')
  largest = _LARGEST_INT if whole else _LARGEST
  if not -largest <= value <= largest:  # NaN is refused, too
    bits = 'an integer' if whole else 'a float'
    _refuse(config, prefix, name, f'must be finite, and fit {bits} of 32 bits')
  return value


def key(config: Any) -> Any:
  """Returns what two configurations have in common if they are equal; hashable.

  Dicts, which have no hash, are compared by their items in any order, classes
  by identity and numbers with their types.
  """
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    fields = (f.name for f in dataclasses.fields(config))
    return type(config), *((f, key(getattr(config, f))) for f in fields)
  if isinstance(config, Mapping):
    return dict, frozenset((k, key(v)) for k, v in config.items())
  if isinstance(config, list | tuple):
    return tuple, *map(key, config)
  try:
    hash(config)
  except TypeError:
    return type(config), id(config)
  return type(config), config
