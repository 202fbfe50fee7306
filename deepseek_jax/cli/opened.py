"""Loads what is sampled from: a run, a Hugging Face folder, a converted one."""

import os
from typing import Any, NamedTuple

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.data import boundaries, from_file
from deepseek_jax.errors import InputError
from deepseek_jax.hf.source import absent


class Opened(NamedTuple):
  """Holds what is sampled from.

  Attributes:
    model, variables: its pure functions and arrays.
    tokenizer: of the run or folder.
    folder: where the chat template is.
    boundaries: tokens that begin and end a text.
  """

  model: ds.Model
  variables: dict
  tokenizer: Any
  folder: str
  boundaries: boundaries.Boundaries


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
    run = ds.load(workdir)
    return Opened(
      run.model,
      run.variables,
      run.tokenizer,
      workdir,
      boundaries.of_run(run.tokenizer),
    )
  if not os.path.isdir(folder):
    raise InputError(f'--hf={folder}: {absent(folder)}')
  if os.path.exists(os.path.join(folder, hf.store.MODEL)):
    config, variables = hf.restore(folder)
    about = hf.store.Store(folder).notes.get('carried', {})
  else:
    config, variables = hf.load(folder)
    about = None  # config.json
  config = ds.changed(config, {'compute.dtype': dtype})
  tokenizer = from_file(os.path.join(folder, 'tokenizer.json'))
  around = boundaries.boundaries(folder, tokenizer, about)
  return Opened(ds.build(config), variables, tokenizer, folder, around)
