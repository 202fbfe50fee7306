"""Loads the file that --config names, as a module with a stable name.

A class that the file defines is stored as 'module:Class' in the config.json of
a run, and found again by that name: the name of the file, in any folder.
"""

import functools
import hashlib
import os
import sys
import sysconfig
import types
from importlib.machinery import PathFinder

from absl import flags

from deepseek_jax import own_classes
from deepseek_jax.errors import InputError

# Begins the name of a module whose file has the name of another module. No
# class can be stored by it.
_NAMELESS = 'experiment file '


def load(path: str) -> types.ModuleType:
  """Returns the module of a file; runs the file unless it did already.

  The module is called as the file is, and keeps the hash of what was run.
  """
  path = os.path.abspath(path)
  with open(path, 'rb') as file:
    code = file.read()
  digest = hashlib.sha256(code).hexdigest()
  name, _ = os.path.splitext(os.path.basename(path))
  there = sys.modules.get(name)
  if there is not None and _is_of(there, path):
    if getattr(there, own_classes.DIGEST, digest) == digest:
      return there
  elif there is not None or _is_taken(name):
    name = _NAMELESS + name
  module = types.ModuleType(name)
  module.__file__ = path
  setattr(module, own_classes.DIGEST, digest)
  sys.modules[name] = module  # its dataclasses look for it
  try:
    exec(compile(code, path, 'exec', dont_inherit=True), vars(module))
  except BaseException:
    del sys.modules[name]
    raise
  return module


def _is_of(module: types.ModuleType, path: str) -> bool:
  file = getattr(module, '__file__', None)
  return bool(file) and os.path.realpath(file) == os.path.realpath(path)


@functools.cache
def _is_taken(name: str) -> bool:
  """Whether a module of this name could be imported later, or none can be."""
  if not name.isidentifier() or name in sys.stdlib_module_names:
    return True
  installed = sysconfig.get_paths()
  places = [installed['purelib'], installed['platlib']]
  return PathFinder.find_spec(name, places) is not None


def check_name(plain, path: str) -> None:
  """Raises InputError if a file defines classes of `plain` without a name."""
  for kind in own_classes.kinds(plain).values():
    if kind.startswith(_NAMELESS):
      name = kind.partition(':')[0].removeprefix(_NAMELESS)
      raise InputError(
        f'{path}: defines a class of the configuration, which is stored as'
        f' {name}:{kind.partition(":")[2]}; but {name} is another module, or no'
        ' name for one: rename the file'
      )


def define_flag() -> flags.FlagHolder:
  """Defines --config of launchers that read a run's folder."""
  return flags.DEFINE_string(
    'config',
    None,
    'The experiment file of the run, where it defines classes of the model.',
  )


def load_flag(holder: flags.FlagHolder) -> None:
  """Loads the file of `define_flag`, if one is given; its classes are known.

  Raises:
    InputError: it is no file, or fails.
  """
  if not holder.value:
    return
  path = holder.value.partition(':')[0]
  if not os.path.isfile(path):
    raise InputError(
      f'--config={path}: no such file; give the experiment file of the run'
    )
  try:
    load(path)
  except Exception as error:  # the user's file may raise anything
    raise InputError(
      f'--config={path}: {type(error).__name__}: {error}'
    ) from error
