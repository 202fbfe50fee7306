"""Reads the conversations of a run: rendered, split, packed, in memory.

It has the face of a `data.TokenStore`, and its batches that of `data.Batches`:
a run trains on conversations as on text. Legend: R rows, T tokens read.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deepseek_jax.data import batches, conversations, packing, tokenizer
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import unit_hash
from deepseek_jax.errors import InputError
from deepseek_jax.infer import formats
from deepseek_jax.rl import examples
from deepseek_jax.rl.chats import ChatConfig, FormatChat

Tokenizer = tokenizer.Tokenizer | tokenizer.ByteTokenizer


@dataclasses.dataclass(frozen=True)
class ConversationStore:
  """Holds the examples of a run.

  Attributes:
    train, heldout: examples that are trained on, or never.
    ends: token ids that end a turn.
    seq_len: T; rows have one token more.
  """

  train: tuple[examples.Example, ...]
  heldout: tuple[examples.Example, ...]
  ends: tuple[int, ...]
  seq_len: int
  _tokenizer: Tokenizer

  @property
  def index(self) -> dict:
    """Returns the hash of the tokenizer, where a `data.TokenStore` has it."""
    return {'tokenizer': {'sha256': self._tokenizer.sha256}}

  @property
  def train_sha256(self) -> str:
    """Returns the SHA-256 of what is trained on: tokens and masks."""
    return _sha256(self.train)

  @property
  def heldout_sha256(self) -> str:
    """Returns the SHA-256 of what is held out."""
    return _sha256(self.heldout)

  def tokenizer(self) -> Tokenizer:
    """Returns the tokenizer."""
    return self._tokenizer

  def heldout_batches(self, size: int, limit: int | None) -> 'HeldoutAnswers':
    """Returns batches of the first `limit` held-out examples; None: of all.

    Raises:
      InputError: there are none.
    """
    return HeldoutAnswers(self, size, limit)


def tokenizer_of(config: DataConfig) -> Tokenizer:
  """Returns the tokenizer that data.tokenizer names.

  Raises:
    InputError: it is to be trained, or has more tokens than the model.
  """
  if config.sources:
    raise InputError('data.sources: are of text; give one data.path')
  if config.tokenizer == 'bpe':
    raise InputError(
      "data.tokenizer = 'bpe': conversations train no tokenizer; give 'bytes'"
      ' or the tokenizer.json of the model, which its run has'
    )
  made = (
    tokenizer.ByteTokenizer()
    if config.tokenizer == 'bytes'
    else tokenizer.from_file(config.tokenizer)
  )
  if made.vocab_size > config.vocab_size:
    raise InputError(
      f'data.vocab_size = {config.vocab_size}: the tokenizer has'
      f' {made.vocab_size} tokens; set it to at least that'
    )
  return made


def build(
  config: DataConfig, chat: ChatConfig, *, say: Callable[[str], None]
) -> ConversationStore:
  """Returns the examples of the conversations in data.path.

  Args:
    config: path, tokenizer, seq_len, heldout_fraction and seed count.
    chat: how they are written.
    say: takes a line on what became of them.

  Raises:
    InputError: names the field, or the line of the file, that is wrong.
  """
  made = tokenizer_of(config)
  writer, counts = chat.build(made), examples.Counts()
  sides: tuple[list, list] = [], []
  otherwise = isinstance(writer, FormatChat)
  for conversation in conversations.read(config.path):
    side = sides[_held_out(conversation, config.heldout_fraction)]
    side += examples.examples(
      [conversation], writer, config.seq_len + 1, counts
    )
    otherwise = otherwise and writer.asks_otherwise(conversation.messages)
  say(counts.line())
  if otherwise and counts.conversations:
    thinks = formats.get(chat.format).thinks
    say(
      f'chat.thinking = None: {"no" if thinks else "every"} answer has'
      f' reasoning, but chat.format = {chat.format!r} asks'
      f' {"with" if thinks else "without"} thinking; set chat.thinking ='
      f' {not thinks}, so that the model is asked as it has learnt'
    )
  if not sides[0]:
    raise InputError(
      f'data.path = {config.path!r}: no example is left to train on'
      f' ({counts.line()}); raise data.seq_len or lower data.heldout_fraction'
    )
  train, heldout = map(tuple, sides)
  return ConversationStore(train, heldout, writer.ends, config.seq_len, made)


def _held_out(said: conversations.Conversation, share: float) -> bool:
  """Returns whether a conversation is never trained on, by what is asked.

  Conversations that ask the same are on one side.
  """
  asked = [m for m in said.messages if m['role'] != 'assistant']
  text = json.dumps(asked, sort_keys=True, default=str)
  return unit_hash('conversation', text) < share


def _sha256(some: Sequence[examples.Example]) -> str:
  """Returns the SHA-256 of examples in their order."""
  digest = hashlib.sha256()
  for example in some:
    for array in (example.tokens, example.trained):
      digest.update(len(array).to_bytes(8, 'big') + array.tobytes())
  return digest.hexdigest()


class PackedBatches(batches.Batches):
  """Draws packed rows in a seeded, resumable order, as Batches draw windows."""

  def __init__(self, store: ConversationStore, config: DataConfig):
    """Packs the examples; every epoch has the same rows in another order."""
    lengths = [len(e.tokens) for e in store.train]
    self._store, self._config = store, config
    self._recut, self.drawn = False, []
    self._packed = packing.best_fit(lengths, store.seq_len + 1)
    self._dataset = batches.shuffled(len(self._packed), str(config.seed))
    self.windows = len(self._packed)  # in an epoch
    self._stream = {
      'train_sha256': store.train_sha256,
      'heldout_sha256': store.heldout_sha256,
      'seq_len': config.seq_len,
      'seed': config.seed,
    }
    self._tokenizer = store.index['tokenizer']['sha256']
    self._next = 0
    self.ngrams = None

  def _open(self, *, recut: bool) -> None:
    """Does nothing: rows are packed once."""

  def _arrays(
    self, numbers: range
  ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns the arrays of rows, their segments and their positions."""
    rows = [self._packed[self._dataset[i]] for i in numbers]
    out = _laid_out(self._store, self._store.train, rows)
    return out, out['segments'], out['positions']


def _laid_out(
  store: ConversationStore,
  some: Sequence[examples.Example],
  rows: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
  """Returns the arrays of packed rows."""
  used = {n for row in rows for n in row}
  arrays = {n: some[n].arrays() for n in used}
  return packing.laid_out(
    arrays, rows, store.seq_len + 1, pad=store.tokenizer().pad_id
  )


class HeldoutAnswers:
  """Yields batches of held-out examples, with the face of a `data.Heldout`.

  Attributes:
    bytes: of the text to be produced, in UTF-8, ends of turns left out.
    tokens: to be produced.
  """

  def __init__(self, store: ConversationStore, size: int, limit: int | None):
    """Packs the examples."""
    if not store.heldout:
      raise InputError(
        'data.heldout_fraction: holds out no conversation; raise it'
      )
    self._store, self._size = store, size
    self._some = store.heldout[:limit]
    lengths = [len(e.tokens) for e in self._some]
    self._rows = packing.best_fit(lengths, store.seq_len + 1)
    learnt = [e.tokens[e.trained > 0].tolist() for e in self._some]
    self.tokens = sum(map(len, learnt))
    plain = ([t for t in row if t not in store.ends] for row in learnt)
    decode = store.tokenizer().decode
    self.bytes = sum(len(decode(row).encode()) for row in plain)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Yields dicts of arrays as `data.Heldout` does, the last filled up."""
    for start in range(0, len(self._rows), self._size):
      rows = self._rows[start : start + self._size]
      rows += [[]] * (self._size - len(rows))
      out = _laid_out(self._store, self._some, rows)
      segments = out['segments']
      inside = segments[:, 1:] == segments[:, :-1]
      out['weights'] = out.pop('trained')[:, 1:] * inside
      yield out

  def bits_per_byte(self, nll: float) -> float:
    """Returns bits per byte of what is to be produced, from nats."""
    return nll / math.log(2) / max(self.bytes, 1)
