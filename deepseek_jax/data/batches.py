"""Draws batches of token windows in one seeded, resumable order.

Example i is tokens [i T, i T + T], so a window is found by its number alone.
Grain shuffles the numbers, anew in each epoch; the state of the stream is how
many examples it has given. A global batch is the next B of them, whatever the
number of processes, and B may change at every step.
Legend: B batch, T tokens that the model reads, S = T + 1.
"""

import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.token_store import TRAIN, TokenStore
from deepseek_jax.errors import InputError


class Windows:
  """Gives random access to windows of T + 1 tokens; neighbours share one token.

  The up to T tokens at the end that fill no window are left out.
  """

  def __init__(self, tokens: np.ndarray, seq_len: int):
    """Takes tokens [N] and T; copies nothing."""
    self._tokens, self._seq_len = tokens, seq_len

  def __len__(self) -> int:
    """Returns the number of whole windows."""
    return max(len(self._tokens) - 1, 0) // self._seq_len

  def __getitem__(self, i: int) -> np.ndarray:
    """Returns window i, [T + 1] int32."""
    start = i * self._seq_len
    return np.array(self._tokens[start : start + self._seq_len + 1], np.int32)


def dataset(store: TokenStore, config: DataConfig) -> Any:
  """Returns an endless `grain.MapDataset` of windows [S], shuffled each epoch.

  The windows are int32.

  Raises:
    InputError: the text is too short for one window.
  """
  windows = Windows(store.train, config.seq_len)
  if not len(windows):
    raise InputError(
      f'data.seq_len={config.seq_len}: {store.path}/{TRAIN} has only '
      f'{len(store.train)} tokens; set it below that or add text'
    )
  return shuffled(windows, config.seed)


def shuffled(source: Any, seed: int) -> Any:
  """Returns an endless `grain.MapDataset`, shuffled anew in each epoch."""
  import grain

  # Grain shuffles epoch e with seed + e: hashed, so that the second epoch of
  # one seed isn't the first of the next.
  digest = hashlib.sha256(f'order {seed}'.encode()).digest()
  seed = int.from_bytes(digest[:4], 'big')
  return grain.MapDataset.source(source).shuffle(seed=seed).repeat()


def segment(
  tokens: np.ndarray, eos_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the documents of windows by the EOS tokens that end them.

  An EOS belongs to the document it ends.

  Args:
    tokens: [B S] integers.
    eos_id: the EOS token; None, and no document ends inside a window.

  Returns:
    segments [B S] from 1, and positions [B S] from the start of the document or
    of the window; int32.
  """
  starts = np.ones(tokens.shape, bool)
  starts[:, 1:] = tokens[:, :-1] == eos_id
  index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  # The start of the document that each token belongs to.
  first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  segments = np.cumsum(starts, axis=1)
  return segments.astype(np.int32), (index - first).astype(np.int32)


class Batches:
  """Draws the training stream of a store; `get_state` says where it is.

  Attributes:
    windows: in an epoch.
    ngrams: set to a ngrams.NGrams, batches have its rows too.
    told: numbers to record of the last batch.
  """

  told: Mapping[str, float] = types.MappingProxyType({})

  def __init__(self, store: TokenStore, config: DataConfig):
    """Begins the stream at its first window."""
    self._dataset = dataset(store, config)
    self._eos_id = store.eos_id
    self._cross_document = config.cross_document
    self.windows = len(Windows(store.train, config.seq_len))  # in an epoch
    self._stream = {
      'train_sha256': store.train_sha256,
      'heldout_sha256': store.heldout_sha256,
      'seq_len': config.seq_len,
      'seed': config.seed,
      'cross_document': config.cross_document,
    }
    self._tokenizer = store.index['tokenizer']['sha256']
    self._next = 0
    self.ngrams = None

  def next(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> dict[str, np.ndarray]:
    """Returns this process's rows of the next global batch.

    Processes hold equal blocks, in order.

    Args:
      batch_size: windows of the global batch.
      process_index, process_count: which block, and of how many.

    Returns:
      int32 arrays [batch_size / process_count, T + 1]: tokens; unless documents
      may attend to each other segments, the number of the document in the
      window from 1 (0 is for padding), and positions, from the start of the
      segment. And ngrams [.. T + 1, L, K], if the attribute is set.

    Raises:
      InputError: the batch does not divide by the processes.
    """
    if batch_size < 1 or batch_size % process_count:
      raise InputError(
        f'batch_size={batch_size}: set it to a multiple of the '
        f'{process_count} processes'
      )
    if not 0 <= process_index < process_count:
      raise InputError(
        f'process_index={process_index}: set it to one of 0 to '
        f'{process_count - 1}'
      )
    rows = batch_size // process_count
    start = self._next + process_index * rows
    # By number alone, so any process count reads the same global batch.
    out, segments, positions = self._read(range(start, start + rows))
    self._next += batch_size
    if self.ngrams is not None:
      out['ngrams'] = self.ngrams(out['tokens'], segments, positions)
    return out

  def _read(
    self, numbers: range
  ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns the arrays of windows, their segments and their positions."""
    tokens = np.stack([self._dataset[i] for i in numbers])
    eos_id = None if self._cross_document else self._eos_id
    segments, positions = segment(tokens, eos_id)
    out = {'tokens': tokens}
    if not self._cross_document:
      out |= {'segments': segments, 'positions': positions}
    return out, segments, positions

  def see(self, variables: Callable[[], dict]) -> None:
    """Takes a way to the weights of the next step; windows need none."""

  def get_state(self) -> dict:
    """Returns all that a resumed run needs; constant size, ready for JSON.

    Also 'tokenizer_sha256', by which the tokenizer beside a run is known; the
    stream's own hashes decide whether the windows are the same.
    """
    return {
      'next_index': self._next,
      **self._stream,
      'tokenizer_sha256': self._tokenizer,
    }

  def set_state(self, state: dict) -> None:
    """Continues after `get_state`; InputError if it is of another stream."""
    # Earlier versions did not save the hash of the held-out tokens.
    state = {'heldout_sha256': self._stream['heldout_sha256'], **state}
    for name, value in self._stream.items():
      if state.get(name) == value:
        continue
      if name.endswith('sha256'):
        raise InputError(
          'data.path: the token windows are not those that the saved run has'
          f' read ({name} = {value} here, {state.get(name)} there); resume with'
          ' the text that it started with'
        )
      raise InputError(
        f'data.{name}={value!r}: the saved run has {state.get(name)!r}; '
        'resume with the data it started with'
      )
    index = state.get('next_index')
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
      raise InputError(
        f'next_index={index!r} in the saved data state: it is damaged; '
        'resume from another checkpoint'
      )
    self._next = index
