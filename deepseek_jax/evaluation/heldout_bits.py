"""Measures bits per byte of held-out text, as the trainer does."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.data import left_out, windows
from deepseek_jax.errors import InputError
from deepseek_jax.run import sources
from deepseek_jax.run.config import EvaluateConfig
from deepseek_jax.run.opening import Opened
from deepseek_jax.train import evaluate


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


def _documents(path: str) -> Iterator[datalib.Document]:
  """Yields the documents of a path; says which of its text is not read.

  Raises:
    InputError: as in training, for what can't be read.
  """
  out, count = left_out.LeftOut(path), 0
  for document in datalib.documents(path, out):
    count += 1
    yield document
  out.check_records(count)
  if out.line():
    say.warn(out.line())


class _Texts:
  """Holds documents as tokens, as far as a `data.Heldout` reads a store."""

  def __init__(self, path: str, tokenizer: Any):
    """Reads and encodes all text of a path.

    Raises:
      InputError: there is none, or the tokens don't mean all of it.
    """
    self.path, self.pad_id = path, tokenizer.pad_id
    self.eos_id = tokenizer.eos_id
    self._documents, parts, offset = [], [], 0
    for document in _documents(path):
      ids = tokenizer.encode(document.text)
      windows.check_ids(
        document,
        [ids],
        tokenizer,
        exact=True,
        name=f'--text={path}: the tokenizer',
      )
      ids = [*ids, self.eos_id]
      size = len(document.text.encode())
      self._documents.append(
        datalib.HeldoutDocument(document.name, offset, len(ids), size)
      )
      parts.append(np.array(ids, np.int32))
      offset += len(ids)
    if not parts:
      raise InputError(f'--text={path}: has no text')
    self.heldout = np.concatenate(parts)

  def heldout_documents(self) -> list[datalib.HeldoutDocument]:
    """Returns the documents in the order of their tokens."""
    return self._documents


def of_text(source: Opened, path: str, seq_len: int) -> datalib.Heldout:
  """Returns held-out batches of all text of a path.

  Args:
    source: the model, whose tokenizer reads it.
    path: as data.path.
    seq_len: tokens read at once; a run has its own.

  Raises:
    InputError: there is no text, or the tokenizer changes it: bits per byte
      count the bytes of the text, so its tokens have to mean them all.
  """
  if source.config is not None:
    seq_len = source.config.data.seq_len
  store = _Texts(path, source.tokenizer)
  return datalib.Heldout(store, seq_len, EvaluateConfig().batch)


def texts(source: Opened, path: str) -> Sequence[str]:
  """Returns the documents of a path, or those that a run holds out.

  Raises:
    InputError: `path` is 'heldout' and the model is of no run on text.
  """
  if path != 'heldout':
    return [doc.text for doc in _documents(path)]
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
