"""Loads what is sampled from: a run, a Hugging Face folder, a converted one."""

import os

from deepseek_jax.errors import InputError
from deepseek_jax.hf.source import absent
from deepseek_jax.run.opening import Opened, of_folder, of_run

__all__ = ['Opened', 'load']


def load(workdir: str | None, folder: str | None, dtype: str) -> Opened:
  """Returns a run or a folder, loaded.

  Args:
    workdir: --workdir, or None.
    folder: --hf, or None; one of both is given.
    dtype: what a folder's model computes in.

  Raises:
    InputError: none or both are given, or what is there cannot be loaded.
  """
  if bool(workdir) == bool(folder):
    raise InputError('give either --workdir=RUN or --hf=FOLDER')
  if workdir:
    return of_run(workdir)
  if not os.path.isdir(folder):
    raise InputError(f'--hf={folder}: {absent(folder)}')
  return of_folder(folder, dtype)
