"""Writes docs/config.md: every configuration field, from the docstrings.

python docs/tools/config_fields.py           # writes the page
python docs/tools/config_fields.py --check   # status 1 if it is out of date
"""

import dataclasses
import inspect
import pathlib
import sys
import typing
from typing import Any

import deepseek_jax as ds
from deepseek_jax import fields, plan
from deepseek_jax.serve.config import ServeConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'config.md'
# Where a reader meets each tree, and what it is given to.
TREES = (
  (ds.RunConfig, '', 'A run', 'What `ds.fit` and `experiments.pretrain` take.'),
  (
    ds.EngineConfig,
    None,
    'The inference engine',
    'What `ds.Engine` and its requests take; see [Inference](inference.md).',
  ),
  (ds.Request, None, '', ''),
  (ds.SampleConfig, None, '', ''),
  (
    ServeConfig,
    None,
    'The server',
    'What `experiments.serve` makes of its flags.',
  ),
  (
    plan.Recipe,
    'recipe',
    'A plan',
    'What `ds.plan.estimate` and `experiments.plan` take beside a model.',
  ),
)
_INTRO = """# Every configuration field

<!-- Written by docs/tools/config_fields.py: edit the docstrings instead. -->

A configuration is a tree of frozen dataclasses. In Python a field is changed
by its dotted path, `ds.changed(config, {'model.moe.top_k': 2})`; on the command
line by the same path behind `--config.`. A field of the wrong type, an unknown
name or a number out of range is one line that names the field.

The headings say where in a run's tree a class stands. Where several classes may
stand, each has its own section.
"""


def nested(hint: Any) -> list[type]:
  """Returns the dataclasses that a type hint names, in order."""
  if dataclasses.is_dataclass(hint):
    return [hint]
  return [cls for arg in typing.get_args(hint) for cls in nested(arg)]


def walk(cls: type, path: str | None, seen: dict[type, str | None]) -> None:
  """Adds a dataclass and all below it to `seen`, each with its first path."""
  if cls in seen:
    return
  seen[cls] = path
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    below = None if path is None else f'{path}.{field.name}'.lstrip('.')
    for other in nested(hints[field.name]):
      walk(other, below, seen)


def shown_type(hint: Any, known: dict) -> str:
  """Returns a type as Markdown: links to sections, choices of literals."""
  if hint in known:
    return f'[{hint.__name__}](#{hint.__name__.lower()})'
  if hint is type(None):
    return 'None'
  args = typing.get_args(hint)
  origin = typing.get_origin(hint)
  if origin is typing.Literal:
    return ', '.join(f'`{arg!r}`' for arg in args)
  if args and origin in (tuple, dict, list):
    return f'{origin.__name__} of ' + ', '.join(
      shown_type(arg, known) for arg in args if arg is not Ellipsis
    )
  if args:
    return ' or '.join(shown_type(arg, known) for arg in args)
  return getattr(hint, '__name__', str(hint))


def shown_default(field: dataclasses.Field) -> str:
  """Returns a field's default as Markdown; 'required' if it has none."""
  value = field.default
  if value is dataclasses.MISSING:
    if field.default_factory is dataclasses.MISSING:
      return 'required'
    value = field.default_factory()
  if dataclasses.is_dataclass(value):
    return f'`{_brief(value)}`'
  text = repr(value)
  return f'`{text}`' if len(text) <= 60 else f'{len(value)} entries'


def _brief(value: Any) -> str:
  """Returns a dataclass as the call that makes it, long ones without fields."""
  changed = [
    f'{field.name}={getattr(value, field.name)!r}'
    for field in dataclasses.fields(value)
    if field.default is dataclasses.MISSING
    or getattr(value, field.name) != field.default
  ]
  text = f'{type(value).__name__}({", ".join(changed)})'
  return text if len(text) <= 60 else f'{type(value).__name__}(…)'


def _cell(text: str) -> str:
  """Returns text that a table's cell can hold."""
  for mark in '|*<':
    text = text.replace(mark, '\\' + mark)
  return text


def section(cls: type, path: str | None, known: dict) -> str:
  """Returns the section of one dataclass."""
  hints, texts = typing.get_type_hints(cls), fields.texts(cls)
  file = pathlib.Path(inspect.getsourcefile(cls)).relative_to(ROOT)
  owner = 'plan' if (path or '').startswith('recipe') else 'run'
  where = f'`{path}` of a {owner}, ' if path else ''
  summary = (inspect.getdoc(cls) or '').split('\n\n')[0].replace('\n', ' ')
  rows = [
    f'| `{field.name}` | {shown_type(hints[field.name], known)} |'
    f' {shown_default(field)} | {_cell(texts.get(field.name, ""))} |'
    for field in dataclasses.fields(cls)
  ]
  head = '| field | type | default | meaning |\n|---|---|---|---|'
  return (
    f'### {cls.__name__}\n\n{where}`{file}`. {_cell(summary)}\n\n{head}\n'
    + '\n'.join(rows)
    + '\n'
  )


def undocumented() -> list[str]:
  """Returns the fields of all trees that no docstring explains."""
  seen: dict[type, str | None] = {}
  for cls, path, _, _ in TREES:
    walk(cls, path, seen)
  return [
    f'{cls.__name__}.{field.name}'
    for cls in seen
    for field in dataclasses.fields(cls)
    if field.name not in fields.texts(cls)
  ]


def page() -> str:
  """Returns the whole page."""
  known: dict[type, str | None] = {}
  parts = []
  for cls, path, title, text in TREES:
    before = set(known)
    walk(cls, path, known)
    parts.append((title, text, [c for c in known if c not in before]))
  out = [_INTRO]
  for title, text, classes in parts:
    if title:
      out.append(f'## {title}\n\n{text}\n')
    out.extend(section(cls, known[cls], known) for cls in classes)
  return '\n'.join(out)


def main() -> None:
  """Writes the page, or compares it."""
  if '--check' in sys.argv[1:]:
    if not PAGE.exists() or PAGE.read_text() != page():
      print('docs/config.md is out of date: python docs/tools/config_fields.py')
      sys.exit(1)
    return
  PAGE.write_text(page())
  for name in undocumented():
    print(f'no docstring line: {name}', file=sys.stderr)


if __name__ == '__main__':
  main()
