"""A user's own classes in a configuration, and the files that define them.

A plain tree (`config.to_dict`) names a dataclass that the library doesn't have
as 'module:Class'. Nothing here imports a module: a file that is read, such as a
run's config.json, must not decide what code runs.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.errors import InputError

# What a module that was made from a file's bytes keeps: their SHA-256.
DIGEST = '__source_sha256__'


def find(kind: str) -> type | None:
  """Returns the dataclass 'module:Class' if its module is imported already."""
  module, _, name = kind.partition(':')
  found = sys.modules.get(module)
  for part in name.split('.'):
    found = getattr(found, part, None)
  named = isinstance(found, type) and dataclasses.is_dataclass(found)
  return found if named else None


def kinds(plain: Any, path: str = '') -> dict[str, str]:
  """Returns the users' classes of a plain tree: dotted path -> kind."""
  if isinstance(plain, list | tuple):
    items = [(f'{path}[{i}]', v) for i, v in enumerate(plain)]
  elif isinstance(plain, Mapping):
    items = [(f'{path}.{k}'.removeprefix('.'), v) for k, v in plain.items()]
  else:
    return {}
  out = {}
  kind = plain.get('kind') if isinstance(plain, Mapping) else None
  if isinstance(kind, str) and ':' in kind and not _is_ours(kind):
    out[path] = kind
  for where, value in items:
    out |= kinds(value, where)
  return out


def _is_ours(kind: str) -> bool:
  return kind.startswith(f'{__package__}.')


def sources(plain: Any) -> dict[str, dict[str, str | None]]:
  """Returns the files that define the users' classes of a plain tree.

  Returns:
    Module -> {'file': its name, 'sha256': of its bytes}. Both are None where no
    file can be read, as for what a notebook defines.
  """
  modules = {kind.partition(':')[0] for kind in kinds(plain).values()}
  return {name: _source(sys.modules.get(name)) for name in sorted(modules)}


def _source(module) -> dict[str, str | None]:
  path = getattr(module, '__file__', None)
  if not path:
    return {'file': None, 'sha256': None}
  digest = getattr(module, DIGEST, None)
  if digest is None:
    try:
      digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
      return {'file': None, 'sha256': None}
  return {'file': Path(path).name, 'sha256': digest}


def check_loaded(plain: Any, code: Mapping, where: str) -> None:
  """Raises InputError unless every class of a user's own is imported.

  Args:
    plain: a configuration as it was written.
    code: `sources` of it as they were written, or {}.
    where: what holds the configuration, for the message.
  """
  for path, kind in kinds(plain).items():
    if find(kind) is not None:
      continue
    module = kind.partition(':')[0]
    file = _entry(code, module)[0] or f'module {module}'
    if module == '__main__':
      raise InputError(
        f'{where}: {path} is {kind!r}, which a script or a notebook defined'
        f' ({file}): define it there again before this is read, or move it to'
        ' an experiment file for --config=FILE'
      )
    raise InputError(
      f'{where}: {path} is {kind!r}, which is not loaded: give --config=FILE'
      f' with the experiment file of the run ({file}); in Python, import'
      f' {module} first'
    )


def check_same(code: Mapping, now: Mapping, where: str, fix: str) -> None:
  """Raises InputError if a file is another than the one that was written down.

  Args:
    code: `sources` as they were written; modules that it lacks may be any.
    now: `sources` of this process.
    where: what holds the configuration, for the message.
    fix: what to do about it.
  """
  for module in code:
    file, written = _entry(code, module)
    here = _entry(now, module)[1]
    if written and here and written != here:
      raise InputError(
        f'{where}: {file} is another file than the run began with (sha256'
        f' {written} there, {here} here): {fix}'
      )


def _entry(code: Mapping, module: str) -> tuple:
  """Returns the file's name and hash; None for what is missing or no text."""
  entry = code.get(module)
  entry = entry if isinstance(entry, Mapping) else {}
  values = (entry.get('file'), entry.get('sha256'))
  return tuple(v if isinstance(v, str) else None for v in values)
