"""Checks that the packages of an extra are there, before they are needed."""

import importlib.util
from collections.abc import Mapping

from deepseek_jax.errors import InputError, install


def check(extra: str, needed: Mapping[str, str]) -> None:
  """Raises InputError if packages of an extra are missing.

  Args:
    extra: its name.
    needed: module -> package that has it.
  """
  missing = [
    package
    for module, package in needed.items()
    if importlib.util.find_spec(module) is None
  ]
  if missing:
    raise InputError(f'this needs {", ".join(missing)}, {install(extra)}')
