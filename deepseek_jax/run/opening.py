"""Opens a model by its folder: a run, from Hugging Face, or a converted one."""

import os
from typing import Any, NamedTuple

from deepseek_jax import files, hf
from deepseek_jax.config_changes import changed
from deepseek_jax.data import boundaries, from_file
from deepseek_jax.errors import InputError
from deepseek_jax.hf import identity
from deepseek_jax.hf.source import absent
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.run import folder as runs
from deepseek_jax.run.config import RunConfig


class Opened(NamedTuple):
  """Holds what is sampled from.

  Attributes:
    model, variables: its pure functions and arrays.
    tokenizer: of the run or folder.
    folder: where the chat template is.
    boundaries: tokens that begin and end a text.
    config: of a run; None of a Hugging Face folder.
    step: of a run's checkpoint, or None.
  """

  model: Model
  variables: dict
  tokenizer: Any
  folder: str
  boundaries: boundaries.Boundaries
  config: RunConfig | None = None
  step: int | None = None

  @property
  def sha256(self) -> str:
    """Returns the SHA-256 of the weights; reads all of them."""
    return identity.of_variables(self.variables)

  def chat(self) -> ChatConfig:
    """Returns how conversations are written where nobody says: as a run does.

    A Hugging Face folder has its template; without one text is plain.
    """
    if self.config is not None:
      return self.config.chat or ChatConfig('plain')
    return _chat_of(self.folder)


def of_run(workdir: str) -> Opened:
  """Returns a run at its newest whole checkpoint; InputError if it has none."""
  run = runs.load(workdir)
  return Opened(
    run.model,
    run.variables,
    run.tokenizer,
    workdir,
    boundaries.of_run(run.tokenizer),
    run.config,
    run.step,
  )


def of_folder(folder: str, dtype: str = 'float32') -> Opened:
  """Returns a Hugging Face folder, or one that `convert` made of it.

  Args:
    folder: path; must exist.
    dtype: what its model computes in.

  Raises:
    InputError: what is there cannot be loaded.
  """
  if os.path.exists(os.path.join(folder, hf.store.MODEL)):
    config, variables = hf.restore(folder)
    about = hf.store.Store(folder).notes.get('carried', {})
  else:
    config, variables = hf.load(folder)
    about = None  # config.json
  config = changed(config, {'compute.dtype': dtype})
  tokenizer = from_file(os.path.join(folder, 'tokenizer.json'))
  around = boundaries.boundaries(folder, tokenizer, about)
  return Opened(build(config), variables, tokenizer, folder, around)


def opened(folder: str, dtype: str = 'float32') -> Opened:
  """Returns the model of a folder, whichever of the three kinds it is.

  Args:
    folder: of a run, from Hugging Face, or converted.
    dtype: what a model computes in that is no run.

  Raises:
    InputError: it is none of them, or cannot be loaded.
  """
  folder = os.path.expanduser(folder)
  if not os.path.isdir(folder):
    raise InputError(f'{folder}: {absent(folder)}')
  path = os.path.join(folder, 'config.json')
  store = os.path.exists(os.path.join(folder, hf.store.MODEL))
  if not store and not os.path.exists(path):
    raise InputError(
      f'{folder}: has no config.json, so it is neither a run nor a Hugging Face'
      ' folder'
    )
  # A run's has its parts, as 'train'; a published one's says what it is of.
  if not store and 'train' in files.load_json(path):
    return of_run(folder)
  return of_folder(folder, dtype)


def _chat_of(folder: str) -> ChatConfig:
  """Returns the chat of a Hugging Face folder."""
  path = os.path.join(folder, 'tokenizer_config.json')
  beside = os.path.join(folder, 'chat_template.jinja')
  if os.path.exists(path) and (
    os.path.exists(beside) or files.load_json(path).get('chat_template')
  ):
    return ChatConfig('template', folder)
  return ChatConfig('plain')
