"""Stores token windows: two flat files and an index that vouches for them.

    train.bin, heldout.bin   documents back to back, each ended by the EOS token
    tokenizer.json, …        the tokenizer that made them
    index.json               hashes, counts, and the held-out documents by name

Opening reads every byte once: a store that was damaged, or made for another
tokenizer or vocabulary, never starts a run.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deepseek_jax.data import tokenizer as tokenizer_lib
from deepseek_jax.errors import InputError

FORMAT = 1
INDEX, TRAIN, HELDOUT = 'index.json', 'train.bin', 'heldout.bin'
_CHUNK = 1 << 24  # bytes


class HeldoutDocument(NamedTuple):
  """Describes a held-out document and its place in the token file."""

  name: str
  offset: int  # in tokens, into heldout.bin
  tokens: int  # with the EOS that ends it
  bytes: int  # of its text in UTF-8


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """Holds a verified store.

  `train` [N] and `heldout` [M] are uint16 or uint32 token ids.
  """

  path: str
  index: dict
  train: np.ndarray
  heldout: np.ndarray

  @classmethod
  def open(cls, path: str, vocab_size: int | None = None) -> 'TokenStore':
    """Verifies a store and maps its token files.

    Args:
      path: the store's folder.
      vocab_size: of the model; every token id has to be below it.

    Raises:
      InputError: names the file at fault.
    """
    index = read_index(path)
    dtype = np.dtype(index['dtype'])
    largest = 0
    for name, expected in index['files'].items():
      # One read for both: the hash and the largest id.
      tokens = dtype if name in (TRAIN, HELDOUT) else None
      largest = max(largest, _verify(path, name, expected, tokens))
    held = index['tokenizer']['vocab_size']
    if largest >= held:
      raise _damaged(path, TRAIN, f'token {largest} of a vocabulary of {held}')
    if vocab_size is not None and held > vocab_size:
      raise InputError(
        f'data.vocab_size={vocab_size}: the tokenizer of {path} has {held} '
        f'tokens; set it to at least {held}'
      )
    train, heldout = (_map(path, name, dtype) for name in (TRAIN, HELDOUT))
    return cls(path, index, train, heldout)

  @property
  def vocab_size(self) -> int:
    """Returns the size of the tokenizer's vocabulary."""
    return self.index['tokenizer']['vocab_size']

  @property
  def eos_id(self) -> int:
    """Returns the token that ends documents."""
    return self.index['tokenizer']['eos_id']

  @property
  def pad_id(self) -> int:
    """Returns the token that fills rows up."""
    return self.index['tokenizer']['pad_id']

  @property
  def train_sha256(self) -> str:
    """Returns the SHA-256 of the training tokens' file."""
    return self.index['files'][TRAIN]['sha256']

  @property
  def heldout_sha256(self) -> str:
    """Returns the SHA-256 of the held-out tokens' file."""
    return self.index['files'][HELDOUT]['sha256']

  def parts(self) -> list[np.ndarray]:
    """Returns the training tokens of each source, in order."""
    # An earlier version wrote no sources: then there is one.
    sizes = [*self.index.get('sources', {0: len(self.train)}).values()]
    ends = np.cumsum([0, *sizes])
    return [self.train[a:b] for a, b in itertools.pairwise(ends)]

  def tokenizer(self) -> tokenizer_lib.Tokenizer | tokenizer_lib.ByteTokenizer:
    """Returns the tokenizer that made the store; loads it on every call."""
    out = tokenizer_lib.from_file(self.path)
    if out.sha256 != self.index['tokenizer']['sha256']:
      raise _damaged(self.path, 'tokenizer.json', 'another tokenizer')
    return out

  def heldout_documents(self) -> list[HeldoutDocument]:
    """Returns the held-out documents in the order of their tokens."""
    out, offset = [], 0
    for name, tokens, size in self.index['heldout']['list']:
      out.append(HeldoutDocument(name, offset, tokens, size))
      offset += tokens
    return out

  def heldout_texts(self) -> list[str]:
    """Returns the held-out documents as text, exactly as they were read."""
    tokenizer = self.tokenizer()
    return [
      tokenizer.decode(self.heldout[doc.offset : doc.offset + doc.tokens - 1])
      for doc in self.heldout_documents()
    ]


def read_index(path: str) -> dict:
  """Returns the index of a store, with its own hash checked."""
  file = os.path.join(path, INDEX)
  try:
    with open(file, encoding='utf-8') as stream:
      index = json.load(stream)
    sha = index.pop('sha256')
    version = index['format']
  except FileNotFoundError as error:
    raise InputError(
      f'{path} is no token store ({INDEX} is missing): build it again'
    ) from error
  except (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
  ) as error:
    raise _damaged(path, INDEX, 'not the JSON that was written') from error
  if version != FORMAT:
    raise _damaged(path, INDEX, f'format {version}, not {FORMAT}')
  if sha != _index_sha256(index):
    raise _damaged(path, INDEX, 'its sha256 differs')
  return index


def write_index(path: str, index: dict) -> None:
  """Completes `index` with the hashes of the files in `path` and writes it."""
  names = sorted(os.listdir(path))
  index = index | {
    'format': FORMAT,
    'files': {name: _fingerprint(os.path.join(path, name)) for name in names},
  }
  index['sha256'] = _index_sha256(index)
  with open(os.path.join(path, INDEX), 'w', encoding='utf-8') as stream:
    json.dump(index, stream, indent=1)


def _index_sha256(index: dict) -> str:
  """Returns the SHA-256 of an index without its own hash."""
  return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _fingerprint(
  file: str, look: Callable[[bytes], None] = lambda data: None
) -> dict:
  """Returns the bytes and SHA-256 of a file; shows its chunks to `look`."""
  digest = hashlib.sha256()
  with open(file, 'rb') as stream:
    while data := stream.read(_CHUNK):
      digest.update(data)
      look(data)
  return {'bytes': os.path.getsize(file), 'sha256': digest.hexdigest()}


def _verify(
  path: str, name: str, expected: dict, dtype: np.dtype | None
) -> int:
  """Returns the largest token id of an undamaged file; 0 without tokens."""
  largest = [0]

  def look(data: bytes) -> None:
    if dtype and len(data) % dtype.itemsize == 0:
      largest.append(int(np.frombuffer(data, dtype).max()))

  try:
    found = _fingerprint(os.path.join(path, name), look)
  except OSError as error:
    raise _damaged(path, name, error.strerror) from error
  for what in ('bytes', 'sha256'):
    if found[what] != expected[what]:
      wanted = f'{what} {found[what]}, the index says {expected[what]}'
      raise _damaged(path, name, wanted)
  return max(largest)


def _damaged(path: str, name: str, why: str) -> InputError:
  """Returns the InputError for a file at fault."""
  return InputError(
    f'{os.path.join(path, name)} is damaged ({why}): '
    f'delete {path} and run again to rebuild it'
  )


def _map(path: str, name: str, dtype: np.dtype) -> np.ndarray:
  """Returns a token file, mapped read-only."""
  file = os.path.join(path, name)
  if os.path.getsize(file) == 0:  # an empty file can't be mapped
    return np.zeros(0, dtype)
  return np.memmap(file, dtype, 'r')
