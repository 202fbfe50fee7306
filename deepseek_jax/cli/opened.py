"""Loads what is sampled from: a run, a Hugging Face folder, a converted one."""

import os

from deepseek_jax.errors import InputError
from deepseek_jax.hf.source import absent
from deepseek_jax.infer import format_dialect
from deepseek_jax.infer.dialect import Dialect
from deepseek_jax.run.opening import Opened, of_folder, of_run

__all__ = ['Opened', 'choose_dialect', 'load']


def choose_dialect(
  name: str, source: Opened, *, published: bool
) -> Dialect | None:
  """Returns how a model's conversations are written; see `choose`.

  A run that was trained on conversations speaks as these were written.
  """
  chat = source.config.chat if source.config is not None else None
  return format_dialect.choose(
    name,
    source.folder,
    source.tokenizer,
    published=published,
    trained=(chat.format, chat.folder) if chat else None,
    thinking=chat.thinking if chat else None,
  )


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
