"""Measures bits per byte of held-out text, as the trainer does."""

import math
from collections.abc import Sequence
from typing import Any

from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.errors import InputError
from deepseek_jax.run import sources
from deepseek_jax.run.config import EvaluateConfig
from deepseek_jax.run.opening import Opened
from deepseek_jax.train import evaluate

# Below 1 by less than a document's hash can be: all of them are held out.
_ALL = math.nextafter(1.0, 0.0)


def of_run(source: Opened) -> Any:
  """Returns the held-out batches of a run, all that validation could read.

  Raises:
    InputError: it is no run, or holds nothing out.
  """
  config = _config(source, '--bits')
  if config.rollouts is not None:
    raise InputError(
      '--bits: this run learns from answers of its own, and holds problems out,'
      ' no text; measure it with --task'
    )
  return sources.heldout(sources.opened(config, say.warn), config, None)


def of_text(source: Opened, path: str, seq_len: int) -> datalib.Heldout:
  """Returns held-out batches of all text of a path.

  Args:
    source: the model, whose tokenizer reads it.
    path: as data.path.
    seq_len: tokens read at once; a run has its own.

  Raises:
    InputError: there is no text.
  """
  if source.config is not None:
    seq_len = source.config.data.seq_len
  cfg = datalib.DataConfig(
    path=path,
    tokenizer=_tokenizer_of(source),
    vocab_size=source.model.config.vocab_size,
    seq_len=seq_len,
    fim_rate=0.0,
    heldout_fraction=_ALL,
  )
  store = datalib.build(cfg, say=say.warn)
  return datalib.Heldout(store, seq_len, EvaluateConfig().batch)


def _tokenizer_of(source: Opened) -> str:
  """Returns what data.tokenizer names the tokenizer of a model by."""
  return f'{source.folder}/tokenizer.json'


def texts(source: Opened, path: str) -> Sequence[str]:
  """Returns the documents of a path, or those that a run holds out.

  Raises:
    InputError: `path` is 'heldout' and the model is of no run on text.
  """
  if path != 'heldout':
    return [doc.text for doc in datalib.documents(path)]
  config = _config(source, '--infill=heldout')
  if config.chat is not None:
    raise InputError(
      '--infill=heldout: this run was trained on conversations; give a path'
    )
  return datalib.build(config.data, say=say.warn).heldout_texts()


def _config(source: Opened, flag: str) -> Any:
  """Returns the configuration of a run; InputError if it is none."""
  if source.config is None:
    raise InputError(
      f'{flag}: a Hugging Face folder holds nothing out; give a path with'
      ' --text or --infill'
    )
  return source.config


def measured(source: Opened, heldout: Any) -> dict[str, Any]:
  """Returns the bits per byte of held-out batches, and of how many bytes."""
  bits = evaluate.bits_per_byte(source.model, source.variables, heldout)
  return {
    'bits_per_byte': bits,
    'bytes': heldout.bytes,
    'tokens': heldout.tokens,
  }
