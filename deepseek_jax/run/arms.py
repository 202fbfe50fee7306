"""Reads the arms of a comparison from the folders of their runs."""

import os
from collections.abc import Sequence

from deepseek_jax.record import comparison
from deepseek_jax.run import folder


def read_arms(
  runs: str | os.PathLike | Sequence[str | os.PathLike],
) -> list[comparison.Arm]:
  """Returns the arms of runs; those that differ in seeds alone are one arm.

  Args:
    runs: folders of runs, or folders that hold runs.

  Raises:
    InputError: a path holds no run, or two runs are the same.
  """
  given = [runs] if isinstance(runs, str | os.PathLike) else runs
  found = comparison.folders([os.fspath(path) for path in given])
  return comparison.arms([comparison.read(p, folder.filled) for p in found])
