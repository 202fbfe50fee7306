"""Reads held-out text for bits per byte: each document by itself.

A document of n tokens is read as EOS, d_1 … d_n, EOS: the first EOS starts it,
and its tokens and the last EOS are predicted, each exactly once. Longer ones
are read in windows that overlap by T - stride, so that all but the first T
tokens have at least that much context. Legend: B batch, T tokens read.
"""

import dataclasses
import functools
import lzma
import math
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.data.corpus import unit_hash
from deepseek_jax.data.token_store import HeldoutDocument, TokenStore
from deepseek_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Heldout:
  """Yields evaluation batches of the held-out documents, as often as needed.

  batch: global rows of a batch; each process gets its block of every one.
  stride: how far windows move, 1 to T; None is T // 2. Smaller is slower and
    gives more context.
  limit: how many documents at most, drawn by the hash of their names.
  """

  store: TokenStore
  seq_len: int
  batch: int
  stride: int | None = None
  limit: int | None = None
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self) -> None:
    """Raises InputError without documents, or for a size that does not fit."""
    if self.limit is not None and self.limit < 1:
      raise InputError(f'limit={self.limit}: set it to at least 1, or to None')
    if not self.documents:
      raise InputError(
        f'{self.store.path} holds out no document: '
        'set data.heldout_fraction above 0'
      )
    if self.stride is not None and not 1 <= self.stride <= self.seq_len:
      raise InputError(
        f'stride={self.stride}: set it to 1 up to seq_len={self.seq_len}'
      )
    if self.batch < 1 or self.batch % self.process_count:
      raise InputError(
        f'batch={self.batch}: set it to a multiple of the '
        f'{self.process_count} processes'
      )

  @functools.cached_property
  def documents(self) -> list[HeldoutDocument]:
    """Returns the documents that are read."""
    docs = self.store.heldout_documents()
    if self.limit is not None:
      chosen = sorted(docs, key=lambda doc: unit_hash('evaluate', doc.name))
      docs = sorted(chosen[: self.limit], key=lambda doc: doc.offset)
    return docs

  @property
  def bytes(self) -> int:
    """Returns the UTF-8 bytes of the documents."""
    return sum(doc.bytes for doc in self.documents)

  @property
  def tokens(self) -> int:
    """Returns the predicted tokens: the sum of all processes' weights."""
    return sum(doc.tokens for doc in self.documents)

  def bits_per_byte(self, nll: float) -> float:
    """Returns bits per UTF-8 byte of the documents, from nats.

    Args:
      nll: sum over all predicted tokens of -log p, in nats.
    """
    return nll / math.log(2) / self.bytes

  def __len__(self) -> int:
    """Returns the number of batches."""
    rows = sum(len(self._spans(doc.tokens)) for doc in self.documents)
    return -(-rows // self.batch)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Yields dicts of arrays, the last filled up with rows of weight 0.

    tokens, segments (1, or 0 for padding), positions: [B T+1] int32. weights
    [B T] float32: 1 where tokens[:, t + 1] is to be predicted. document [B]
    int32: its number in `documents`, -1 for padding.
    """
    rows = [
      (number, doc, *span)
      for number, doc in enumerate(self.documents)
      for span in self._spans(doc.tokens)
    ]
    share = self.batch // self.process_count
    for start in range(0, len(rows), self.batch):
      first = start + self.process_index * share
      mine = rows[first : min(first + share, start + self.batch)]
      yield self._batch(mine, share)

  def _spans(self, tokens: int) -> list[tuple[int, int]]:
    """Returns (window's start, first target in it) for `tokens` predictions."""
    stride = self.stride or max(self.seq_len // 2, 1)
    spans, start, done = [], 0, 0
    while done < tokens:
      spans.append((start, done - start))
      done = min(start + self.seq_len, tokens)
      # The last window is moved back until it is full, which only adds context.
      start = max(min(start + stride, tokens - self.seq_len), 0)
    return spans

  def _batch(self, rows: Sequence[tuple], size: int) -> dict[str, np.ndarray]:
    """Returns `size` rows as arrays; rows beyond those given are padding."""
    T = self.seq_len
    out = {
      'tokens': np.full((size, T + 1), self.store.pad_id, np.int32),
      'segments': np.zeros((size, T + 1), np.int32),
      'positions': np.tile(np.arange(T + 1, dtype=np.int32), (size, 1)),
      'weights': np.zeros((size, T), np.float32),
      'document': np.full(size, -1, np.int32),
    }
    for row, (number, doc, start, target) in enumerate(rows):
      body = self.store.heldout[doc.offset : doc.offset + doc.tokens]
      # EOS, d_1 ... d_n, EOS: position t predicts t + 1.
      read = np.concatenate([[self.store.eos_id], body])[start : start + T + 1]
      out['tokens'][row, : len(read)] = read
      out['segments'][row, : len(read)] = 1
      # Targets before it were predicted in the window before.
      out['weights'][row, target : len(read) - 1] = 1
      out['document'][row] = number
    return out


def uniform_bits_per_byte(heldout: Heldout, vocab_size: int) -> float:
  """Returns the bits per byte of guessing each of `vocab_size` tokens alike.

  The tokenizer is not charged for what it learnt, so on a small corpus this
  can undercut a compressor that pays for everything.
  """
  return heldout.bits_per_byte(heldout.tokens * math.log(vocab_size))


def xz_bits_per_byte(texts: Sequence[str]) -> float:
  """Returns `xz -9` of each text by itself: compressed bits over all bytes."""
  data = [text.encode() for text in texts]
  if not any(data):
    raise InputError('texts: empty; give at least one document')
  packed = sum(len(lzma.compress(part, preset=9)) for part in data)
  return 8 * packed / sum(map(len, data))
