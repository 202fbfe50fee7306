"""Describes the model that a server answers with, apart from its engine."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.data.boundaries import Boundaries
from deepseek_jax.infer.dialect import Dialect

_SAMPLE = 64  # numbers of each array in the fingerprint


@dataclasses.dataclass(frozen=True)
class Served:
  """Holds what requests need to know of a model.

  Attributes:
    name: in /v1/models, and what a request calls it.
    tokenizer: encode, decode, decoder, fim, vocab_size.
    boundaries: tokens that begin and end a text.
    context: most tokens of a prompt and its answer.
    vocab_size: token ids of a prompt are below it.
    dialect: how a conversation is written; None: completions only.
    grammar: see `grammars.reader`; None: answers are not constrained.
    fingerprint: of the weights.
    created: seconds since 1970.
  """

  name: str
  tokenizer: Any
  boundaries: Boundaries
  context: int
  vocab_size: int
  dialect: Dialect | None = None
  grammar: Callable[[str, Any, int | None], Any] | None = None
  fingerprint: str = 'fp_0'
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  @property
  def stop(self) -> tuple[int, ...]:
    """Returns the tokens that end an answer."""
    return self.boundaries.ends

  def prompt(self, text: str) -> list[int]:
    """Returns the tokens of a text to go on from.

    Text never becomes a special token; an empty one is that which begins texts.
    """
    ids = self.boundaries.around(self.tokenizer.encode(text))
    return ids or [self.tokenizer.eos_id]

  def infill(self, before: str, after: str) -> list[int]:
    """Returns the tokens after which the middle of a text is written."""
    marks, encode = self.tokenizer.fim, self.tokenizer.encode
    return self.boundaries.around(
      [marks.begin, *encode(before), marks.hole, *encode(after), marks.end]
    )

  def token_bytes(self, token: int) -> bytes:
    """Returns the text of one token as bytes; not all tokens are characters."""
    data = getattr(self.tokenizer.decoder(), 'bytes_of', None)
    if data is not None:
      return data(token)
    return self.tokenizer.decode([token]).encode()

  def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of several texts to go on from."""
    return [self.prompt(text) for text in texts]


def fingerprint(variables: Any) -> str:
  """Returns a short hash that tells weights apart.

  Looks at shapes, dtypes and some numbers of every array: reading all of a
  large model would take as long as loading it.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    step = max(1, leaf.size // _SAMPLE)
    some = np.asarray(leaf.reshape(-1)[::step][:_SAMPLE])
    about = (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
    digest.update(repr(about).encode())
    digest.update(some.tobytes())
  return f'fp_{digest.hexdigest()[:16]}'
