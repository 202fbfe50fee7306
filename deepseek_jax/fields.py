"""Describes the fields of configurations by their docstrings.

A class says what its fields are under `Attributes:`, or in lines `name: text`
after its first paragraph; one text may stand for several names, as in
`heads, dim: …`.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from deepseek_jax import config as configs

_ITEM = re.compile(r'( *)(\w+(?:, \w+)*): +(\S.*)')


class FieldRow(NamedTuple):
  """Describes a field of a configuration.

  Attributes:
    path: dotted.
    kind: what it may hold, as text.
    value: what it holds.
    text: of the docstring; '' if it has none.
    optional: may be None.
  """

  path: str
  kind: str
  value: Any
  text: str
  optional: bool = False


class Section(NamedTuple):
  """Holds the fields of one dataclass of a configuration.

  Attributes:
    path: of the dataclass; '' is the whole configuration.
    name: of its class.
    text: the first line of its docstring.
    kinds: names of the classes that could stand there, if there are several.
    rows: the fields that are no sections themselves.
  """

  path: str
  name: str
  text: str
  kinds: tuple[str, ...]
  rows: tuple[FieldRow, ...]


def texts(cls: type) -> dict[str, str]:
  """Returns what the docstring of a dataclass says of its fields, by name."""
  names = {f.name for f in dataclasses.fields(cls)}
  found: dict[str, str] = {}
  # A class that has the fields of another need not tell them again.
  for base in cls.__bases__:
    if dataclasses.is_dataclass(base):
      found |= texts(base)
  current, depth = [], 0
  for line in (inspect.getdoc(cls) or '').splitlines():
    item = _ITEM.fullmatch(line)
    if item and names & set(item[2].split(', ')):
      current, depth = item[2].split(', '), len(item[1])
      found |= dict.fromkeys(names & set(current), item[3])
    elif line.strip() and len(line) - len(line.lstrip()) > depth:
      for name in names & set(current):
        found[name] += f' {line.strip()}'
    else:
      current = []
  return found


def kind_of(annotation: Any) -> str:
  """Returns an annotation as people write it: 'int or None', "'a' or 'b'"."""
  members = configs.alternatives(annotation)
  out = []
  for member in members:
    if typing.get_origin(member) is Literal:
      out += map(repr, typing.get_args(member))
    elif member is type(None):
      out.append('None')
    elif dataclasses.is_dataclass(member):
      out.append(configs.kind_name(member))
    else:
      out.append(getattr(member, '__name__', str(member)))
  return ' or '.join(out)


def sections(config: Any, path: str = '', annotation: Any = None) -> Iterator:
  """Yields the sections of a configuration: itself, then those inside."""
  cls = type(config)
  hints, about = typing.get_type_hints(cls), texts(cls)
  rows, inside = [], []
  for field in dataclasses.fields(config):
    value, hint = getattr(config, field.name), hints[field.name]
    where = f'{path}.{field.name}'.removeprefix('.')
    if dataclasses.is_dataclass(value):
      inside.append((value, where, hint))
      continue
    text = about.get(field.name, '')
    optional = type(None) in configs.alternatives(hint)
    rows.append(FieldRow(where, kind_of(hint), value, text, optional))
    if isinstance(value, dict):
      parts = {k: v for k, v in value.items() if dataclasses.is_dataclass(v)}
      inside += [(v, f'{where}.{k}', None) for k, v in parts.items()]
  classes = configs.classes_of(annotation)
  kinds = tuple(map(configs.kind_name, classes)) if len(classes) > 1 else ()
  first = (inspect.getdoc(cls) or '').partition('\n')[0]
  yield Section(path, cls.__name__, first, kinds, tuple(rows))
  for part in inside:
    yield from sections(*part)
