"""Shows what a launcher takes: its flags and every field of a configuration."""

import dataclasses
import difflib
import shlex
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from absl import flags

from deepseek_jax import fields
from deepseek_jax.errors import InputError

_HELP = (
  '--help',
  '-help',
  '-h',
  '--helpfull',
  '-helpfull',
  '--helpshort',
  '-?',
)


def asked(argv: Iterable[str]) -> str | None:
  """Returns the section that --help=SECTION names, '' of --help, else None."""
  for arg in argv:
    if arg in _HELP:
      return ''
    if arg.startswith(('--help=', '-help=')):
      return arg.partition('=')[2]
  return None


def of_launcher(doc: str, program: str) -> str:
  """Returns what a launcher does, and its flags."""
  out = [doc.strip(), '', 'flags:']
  for flag in _flags(program):
    default = '' if flag.default is None else f' (default: {flag.default!r})'
    out += [f'  --{flag.name}: {line}' for line in [f'{flag.help}{default}']]
  # Launchers that read a run's folder have a --config without fields.
  if 'config' in flags.FLAGS and hasattr(
    type(flags.FLAGS['config']), 'override_values'
  ):
    out += [
      '',
      '--help with --config=NAME_OR_FILE lists every field, --help=model.moe'
      ' one section.',
    ]
  return '\n'.join(out)


def _flags(program: str) -> list[flags.Flag]:
  """Returns the flags that are a launcher's own, by name."""
  known = flags.FLAGS.get_key_flags_for_module(program)
  return sorted(known, key=lambda flag: flag.name)


def of_config(config: Any, section: str = '') -> str:
  """Returns every field of a configuration, by section.

  Args:
    config: a dataclass.
    section: dotted path; the sections at and below it. '': all.

  Raises:
    InputError: there is no such section.
  """
  every = list(fields.sections(config))
  section = section.removeprefix('config.')
  below = f'{section}.'
  shown = [
    s for s in every if not section or f'{s.path}.'.startswith(below)
  ]  # fmt: skip
  if not shown:
    rows = [r for s in every for r in s.rows if r.path == section]
    if rows:
      return '\n'.join(_row(rows[0]))
    paths = [s.path for s in every if s.path]
    near = difflib.get_close_matches(section, paths, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise InputError(
      f'--help={section}: no such section; {hint}sections are'
      f' {", ".join(paths)}'
    )
  out = []
  for one in shown:
    kinds = f'; kinds: {", ".join(one.kinds)}' if one.kinds else ''
    out.append(f'{one.path or "config"} ({one.name}{kinds}): {one.text}')
    for row in one.rows:
      out += _row(row)
    out.append('')
  return '\n'.join(out).rstrip()


def _row(row: fields.FieldRow) -> list[str]:
  """Returns a field as flags with its value, its type and its meaning.

  Each flag may be given as it stands. A mapping has one of each entry, or where
  entries are sections their names.
  """
  width = max(shutil.get_terminal_size((100, 24)).columns, 60)
  if isinstance(row.value, dict) and not row.optional:
    entries = {f'{row.path}.{key}': v for key, v in row.value.items()}
  else:
    entries = {row.path: row.value}
  lines = [
    f'  --config.{path}.…'
    if dataclasses.is_dataclass(value)
    else f'  --config.{path}={_quoted(value)}'
    for path, value in entries.items()
  ]
  lines = lines or [f'  --config.{row.path}.NAME=…']
  lines[-1] += f'  ({row.kind})'
  return [
    *lines,
    *textwrap.wrap(
      row.text, width, initial_indent=' ' * 6, subsequent_indent=' ' * 6
    ),
  ]


def _quoted(value: Any) -> str:
  """Returns a value as a shell takes it."""
  text = value if isinstance(value, str) else repr(value)
  return f'"{text}"' if "'" in text else shlex.quote(text)
