"""Draws batches of token windows in one seeded, resumable order.

Example i is tokens [i T, i T + T], so a window is found by its number alone.
Grain shuffles the numbers, anew in each epoch, and mixes sources; the state of
the stream is how many examples it has given. A global batch is the next B of
them, whatever the number of processes, and B may change at every step.
Legend: B batch, T tokens that the model reads, S = T + 1.
"""

import functools
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

  An epoch has as many as fit behind each other. From the second on they are cut
  at other places, and the last may go on at the first token: so all tokens are
  read in time, and none always stands at the end of a window.
  """

  def __init__(self, tokens: np.ndarray, seq_len: int, salt: str = ''):
    """Takes tokens [N] and T, and what decides the places; copies nothing."""
    self._tokens, self._seq_len, self._salt = tokens, seq_len, salt

  def __len__(self) -> int:
    """Returns the number of windows of an epoch."""
    return max(len(self._tokens) - 1, 0) // self._seq_len

  def __getitem__(self, i: int) -> np.ndarray:
    """Returns window i of the first epoch, [T + 1] int32."""
    return self.at(i, 0)

  def at(self, i: int, epoch: int) -> np.ndarray:
    """Returns window i of an epoch, [T + 1] int32."""
    size, start = self._seq_len + 1, i * self._seq_len
    if epoch:
      digest = hashlib.sha256(f'cut {self._salt} {epoch}'.encode()).digest()
      start += int.from_bytes(digest[:4], 'big') % self._seq_len
    read = self._tokens[start : start + size]
    if len(read) < size:
      read = np.concatenate([read, self._tokens[: size - len(read)]])
    return np.array(read, np.int32)


def dataset(
  store: TokenStore, config: DataConfig, *, recut: bool = True
) -> Any:
  """Returns an endless `grain.MapDataset` of windows [S], shuffled each epoch.

  Of several sources each has its own order and epochs, and Grain mixes them by
  their weights.

  Args:
    store: the tokens.
    config: sources, order and T.
    recut: cut each epoch at other places; earlier versions did not.

  Returns:
    Pairs (source, window): a number, and int32 [S].

  Raises:
    InputError: the text of a source is too short for one window.
  """
  import grain

  each = []
  for number, (path, tokens) in enumerate(zip(config.paths, store.parts())):
    salt = f'{config.seed} source {number}' if number else f'{config.seed}'
    windows = Windows(tokens, config.seq_len, salt)
    if not len(windows):
      raise InputError(
        f'data.seq_len={config.seq_len}: {store.path}/{TRAIN} has only '
        f'{len(tokens)} tokens of {path!r}; set it below that or add text'
      )
    order = shuffled(len(windows), salt)
    each.append(order.map_with_index(_Cut(number, windows, recut)))
  if len(each) == 1:
    return each[0]
  return grain.MapDataset.mix(each, weights=config.shares)


class _Cut:
  """Maps a place of a source's stream and a number to (source, window)."""

  def __init__(self, source: int, windows: Windows, recut: bool):
    self._source, self._windows, self._recut = source, windows, recut

  def __call__(self, index: int, i: int) -> tuple[int, np.ndarray]:
    """Returns the source and window i, cut as in the epoch of the place."""
    epoch = index // len(self._windows) if self._recut else 0
    return self._source, self._windows.at(int(i), epoch)


def shuffled(count: int, salt: str) -> Any:
  """Returns an endless `grain.MapDataset` of numbers below `count`.

  Each epoch has another order, which the salt decides.
  """
  import grain

  # Grain shuffles epoch e with seed + e: hashed, so that the second epoch of
  # one seed isn't the first of the next.
  digest = hashlib.sha256(f'order {salt}'.encode()).digest()
  seed = int.from_bytes(digest[:4], 'big')
  return grain.MapDataset.range(count).shuffle(seed=seed).repeat()


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


def blank(config: DataConfig, rows: int) -> dict[str, np.ndarray]:
  """Returns zeros in place of what `Batches.next` returns without n-grams."""
  names = ['tokens']
  if not config.cross_document:
    names += ['segments', 'positions']
  zeros = functools.partial(np.zeros, (rows, config.seq_len + 1), np.int32)
  return {name: zeros() for name in names}


class Batches:
  """Draws the training stream of a store; `get_state` says where it is.

  Attributes:
    windows: in an epoch.
    ngrams: set to a ngrams.NGrams, batches have its rows too.
    told: numbers to record of the last batch.
    drawn: windows of each source so far.
  """

  told: Mapping[str, float] = types.MappingProxyType({})

  def __init__(self, store: TokenStore, config: DataConfig):
    """Begins the stream at its first window."""
    self._store, self._config = store, config
    self._open(recut=True)
    self._eos_id = store.eos_id
    self._cross_document = config.cross_document
    each = (len(Windows(part, config.seq_len)) for part in store.parts())
    self.windows = sum(each)  # in an epoch
    self.drawn = [0] * len(config.paths)
    self._stream = {
      'train_sha256': store.train_sha256,
      'heldout_sha256': store.heldout_sha256,
      'seq_len': config.seq_len,
      'seed': config.seed,
      'cross_document': config.cross_document,
    }
    if config.sources:
      self._stream['sources'] = list(config.sources.values())
    self._tokenizer = store.index['tokenizer']['sha256']
    self._next = 0
    self.ngrams = None

  def _open(self, *, recut: bool) -> None:
    """Sets the dataset that is read, and whether epochs are cut anew."""
    self._recut = recut
    self._dataset = dataset(self._store, self._config, recut=recut)

  @property
  def shares(self) -> dict[str, float]:
    """Returns which share of the windows so far each source had; {} of one."""
    total = max(sum(self.drawn), 1)
    if not self._config.sources:
      return {}
    return {p: n / total for p, n in zip(self._config.paths, self.drawn)}

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
    out, segments, positions = self._arrays(range(start, start + rows))
    if self._config.sources:
      for i in range(self._next, self._next + batch_size):
        self.drawn[self._dataset[i][0]] += 1
    self._next += batch_size
    if self.ngrams is not None:
      out['ngrams'] = self.ngrams(out['tokens'], segments, positions)
    return out

  def _arrays(
    self, numbers: range
  ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns the arrays of windows, their segments and their positions."""
    tokens = np.stack([self._dataset[i][1] for i in numbers])
    eos_id = None if self._cross_document else self._eos_id
    segments, positions = segment(tokens, eos_id)
    out = {'tokens': tokens}
    if not self._cross_document:
      out |= {'segments': segments, 'positions': positions}
    return out, segments, positions

  def see(self, variables: Callable[[], dict]) -> None:
    """Takes a way to the weights of the next step; windows need none."""

  def held(self) -> dict[str, Any]:
    """Returns trees of arrays that a checkpoint holds for the stream: none."""
    return {}

  def take(self, held: dict[str, Any]) -> None:
    """Takes back what `held` returned, after `set_state`."""

  def get_state(self) -> dict:
    """Returns all that a resumed run needs; constant size, ready for JSON.

    Also 'tokenizer_sha256', by which the tokenizer beside a run is known; the
    stream's own hashes decide whether the windows are the same.
    """
    return {
      'next_index': self._next,
      **self._stream,
      'tokenizer_sha256': self._tokenizer,
      **({'drawn': self.drawn[:]} if self._config.sources else {}),
      **({'cut': 'epoch'} if self._recut else {}),
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
    drawn = state.get('drawn', [0] * len(self.drawn))
    self.drawn = [int(n) for n in drawn]
    # A run of an earlier version goes on with the windows that it has.
    self._open(recut=state.get('cut') == 'epoch')
