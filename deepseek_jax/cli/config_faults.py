"""Finds which flag or line of an experiment file made a configuration fail."""

import ast
import difflib
import os
import re
import traceback
from typing import Any

from absl import flags
from ml_collections import config_dict

from deepseek_jax.cli import kinds
from deepseek_jax.errors import InputError

WHILST = 'Error whilst parsing config file:'


def in_file(error: Exception, argv: list[str]) -> str | None:
  """Returns the message on an unknown name in the config file, or None."""
  path = os.path.realpath((config_path(argv) or '').partition(':')[0])
  frames = traceback.extract_tb(error.__traceback__)
  inside = [f for f in frames if os.path.realpath(f.filename) == path]
  if not inside:
    return None
  # ml_collections shows all of a sub-config, and the nearest name at the end;
  # an AttributeError of its own holds a KeyError, which holds the text.
  text = error
  while isinstance(text, Exception) and text.args:
    text = text.args[0]
  text = str(text)
  near = re.search(r'Did you mean "(.*)" instead of "(.*)"', text)
  if near:
    what = f'no field {near[2]}; did you mean {near[1]}?'
  else:
    what = f'{type(error).__name__}: {text.partition(" and cannot be")[0]}'
  return f'--config: {what}{place(inside[-1])}'


def place(frame: traceback.FrameSummary) -> str:
  """Returns file and line of a frame as the end of a message."""
  return f' ({frame.filename}, line {frame.lineno})'


def cause(error: object) -> str:
  """Returns the last line of what absl and ml_collections wrap an error in."""
  text = str(error)
  before, mark, trace = text.partition(WHILST)
  if mark:
    text = before + trace.strip().splitlines()[-1]
  own = f'{InputError.__module__}.{InputError.__name__}: '
  return text.rpartition(own)[2]


def config_path(argv: list[str]) -> str | None:
  """Returns the file of the last --config, or None."""
  given = [a.partition('=')[2] for a in argv if a.startswith('--config=')]
  return given[-1] if given else None


def _named(argv: list[str]) -> dict[str, str]:
  """Returns fields of the config that flags name, with the value given."""
  parts = [a[9:].partition('=') for a in argv if a.startswith('--config.')]
  return {field: value for field, _, value in parts}


def _loaded(argv: list[str]) -> Any:
  """Returns the config before flags change it; None if no file is named."""
  path = config_path(argv)
  return path and flags.FLAGS['config'].parser.parse(path)


def inside_none(argv: list[str]) -> str | None:
  """Returns the message on the first --config.a.b whose a is None."""
  config = _loaded(argv)
  for field, value in _named(argv).items():
    inner, parts = config, field.split('.')
    for depth, part in enumerate(parts[:-1], start=1):
      if not isinstance(inner, config_dict.ConfigDict) or part not in inner:
        break
      inner = inner[part]
      if inner is None:
        whole = _literal(value)
        for name in reversed(parts[depth:]):
          whole = {name: whole}
        above = 'config.' + '.'.join(parts[:depth])
        return f'--config.{field}: {above} is None; write --{above}="{whole}"'
  return None


def _literal(text: str) -> Any:
  """Returns text read as a Python literal, or itself."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def unknown_field(argv: list[str]) -> str | None:
  """Returns the message on the first --config.field that does not exist."""
  config = _loaded(argv)
  if config is None:
    return None
  for field in _named(argv):
    inner, known = config, 'config'
    for part in field.split('.'):
      if '[' in part or not isinstance(inner, config_dict.ConfigDict):
        break
      if part not in inner:
        near = difflib.get_close_matches(part, list(inner), n=1, cutoff=0.5)
        hint = (
          f'did you mean --{known}.{near[0]}?'
          if near
          else f'--{known} has {", ".join(inner)}'
        )
        others = kinds.having(known.removeprefix('config.'), part)
        if others:
          hint = (
            f'of its kinds {", ".join(others)} have one:'
            f' --{known}.kind={others[0]}'
          )
        return f'--config.{field}: no field {known}.{part}; {hint}'
      inner, known = inner[part], f'{known}.{part}'
  return None
