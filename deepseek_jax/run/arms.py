"""Reads the arms of a comparison from the folders of their runs."""

import os
from collections.abc import Collection, Iterable
from typing import Any

from deepseek_jax.errors import InputError, told
from deepseek_jax.record import comparison
from deepseek_jax.run import folder


def read_arms(
  runs: str | os.PathLike | Collection[str | os.PathLike],
) -> list[comparison.Arm]:
  """Returns the arms of runs; those that differ in seeds alone are one arm.

  Args:
    runs: folders of runs, or folders that hold runs.

  Raises:
    InputError: a path holds no run, or two runs are the same.
  """
  given = [runs] if isinstance(runs, str | os.PathLike) else runs
  if not isinstance(given, Iterable) or not all(map(_is_path, given)):
    raise InputError(
      f'runs: is {told(runs)}; give the folder of a run or of several, or a'
      ' list of folders'
    )
  found = comparison.folders([os.fspath(path) for path in given])
  return comparison.arms([comparison.read(p, folder.filled) for p in found])


def _is_path(value: Any) -> bool:
  """Returns whether a value names a file or folder."""
  return isinstance(value, str | os.PathLike)
