"""Changes fields of frozen dataclass trees by dotted paths.

Fields that depend on each other may change together: only the result is
checked.
"""

import copy
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_jax.config import field_types, to_dict, typed, unknown_field
from deepseek_jax.errors import InputError, told


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
  """Returns a copy of `config` with dotted fields changed.

  changed(config, {'moe.router.scoring': 'softmax'}) is an ablation. Fields
  that depend on each other may be changed in one call, in any order: only the
  result is checked.

  Raises:
    InputError: there is no such field, or the result makes no sense.
  """
  if not isinstance(changes, Mapping):
    raise InputError(
      f'changes: is {told(changes)}; give a dict, '
      "as {'moe.router.scoring': 'softmax'}"
    )
  return changed_by(config, changes.items())


def with_defaults(written: Any, like: Any) -> Any:
  """Returns JSON values of an earlier version with the fields that came since.

  A field that `written` lacks has its default, which is what it meant then; so
  what was begun goes on with a version that has more fields.

  Args:
    written: JSON values.
    like: what they are compared with: dataclasses, also in dicts and lists.
  """
  if isinstance(written, dict) and dataclasses.is_dataclass(like):
    out = dict(written)
    for field in dataclasses.fields(like):
      if field.name in written:
        part = getattr(like, field.name)
        out[field.name] = with_defaults(written[field.name], part)
      elif field.default is not dataclasses.MISSING:
        out[field.name] = _written(like, field.name, field.default)
      elif field.default_factory is not dataclasses.MISSING:
        out[field.name] = _written(like, field.name, field.default_factory())
    return out
  if isinstance(written, dict) and isinstance(like, Mapping):
    return {k: with_defaults(v, like.get(k)) for k, v in written.items()}
  both = isinstance(written, list) and isinstance(like, list | tuple)
  if both and len(written) == len(like):
    return [with_defaults(*pair) for pair in zip(written, like)]
  return written


def _written(like: Any, name: str, value: Any) -> Any:
  """Returns the JSON value of a field of a dataclass that holds `value`."""
  other = copy.copy(like)  # not checked: fields may not fit one another
  object.__setattr__(other, name, value)
  return json.loads(json.dumps(to_dict(other)[name]))


def changed_by(config: Any, changes: Iterable[tuple[str, Any]]) -> Any:
  """Does what `changed` does, by pairs of a path and a value.

  The last value of a path holds.
  """
  edits = _Edits()
  for path, value in changes:
    edits.add(str(path).split('.'), value)
  return _changed(config, edits, '', None)


class _Edits:
  """Holds changes of a field: a value for all of it, then those inside."""

  def __init__(self):
    self.whole, self.inside = (), {}

  def add(self, parts: list[str], value: Any) -> None:
    """Adds a change at `parts` of a path below this field."""
    if not parts:  # what was changed inside before is gone
      self.whole, self.inside = (value,), {}
    else:
      self.inside.setdefault(parts[0], _Edits()).add(parts[1:], value)


def _changed(config: Any, edits: _Edits, path: str, annotation: Any) -> Any:
  """Returns the value at `path` after its edits.

  An `annotation` of None allows anything.
  """
  for value in edits.whole:
    config = typed(annotation, value, path) if annotation else value
  if not edits.inside:
    return config
  below = lambda name: f'{path}.{name}'.removeprefix('.')
  if isinstance(config, Mapping):
    inner = (typing.get_args(annotation) or (None, None))[1]
    one = lambda k, e: _changed(config.get(k), e, below(k), inner)
    return {**config, **{k: one(k, e) for k, e in edits.inside.items()}}
  names = []
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    names = [f.name for f in dataclasses.fields(config)]
  hints, new = field_types(type(config)) if names else {}, {}
  for name, edit in edits.inside.items():
    if not names:
      raise InputError(f'{below(name)}: {name} is a field of {config!r}')
    if name not in names:
      where = below(name).removesuffix(name)
      raise InputError(unknown_field(where, name, names, type(config)))
    new[name] = _changed(getattr(config, name), edit, below(name), hints[name])
  return dataclasses.replace(config, **new)
