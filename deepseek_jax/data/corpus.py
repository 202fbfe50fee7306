"""Reads documents: real text without a download, or the user's own files.

A document is a name and a text. The order is that of the sorted names; the
split into training and held-out documents looks at the text alone, so adding
documents moves no other one across it, and no copy of one lies on both sides.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deepseek_jax.data import corpus_files, left_out, readers
from deepseek_jax.data.config import MARK, DataConfig
from deepseek_jax.data.left_out import LeftOut
from deepseek_jax.errors import InputError

KINDS = readers.KINDS
STDLIB = 'stdlib'

# Tests are left out because many hold binary or broken text on purpose; the
# rest is generated at install time and differs between machines.
_STDLIB_SKIP = (
  'test',
  'tests',
  'idle_test',
  'site-packages',
  'dist-packages',
  'config-*',
  '_sysconfigdata*',
  'sitecustomize.py',
)


class Document(NamedTuple):
  """Holds a document of a corpus."""

  name: str  # unique in its corpus; relative to the path of the corpus
  text: str


def exists(path: str) -> bool:
  """Returns whether there is something to read at `path`."""
  return path == STDLIB or os.path.exists(os.path.expanduser(path))


def documents(path: str, out: LeftOut | None = None) -> Iterator[Document]:
  """Yields the non-empty documents under `path`, in the order of their names.

  A text file given by itself, and one of more than 16 million characters, is
  cut into documents of about 16,000 characters at blank lines, so that some of
  it can be held out. `out` collects what is not read. Raises InputError if the
  path is missing or of an unknown kind, or if more of it is left out than
  read; reading raises it for text that isn't UTF-8 and for a record without a
  'text' field.
  """
  out = LeftOut(path) if out is None else out
  if path == STDLIB:
    root = sysconfig.get_paths()['stdlib']
    return _read(corpus_files.modules(root, _STDLIB_SKIP), out)
  root = os.path.expanduser(path)
  if not os.path.exists(root):
    raise InputError(
      f"data.path={path!r} does not exist: give 'stdlib', a file or a directory"
    )
  if os.path.isdir(root):
    return _read(corpus_files.find(root, out), out)
  return _read([corpus_files.one(root)], out, whole=False)


def documents_of(
  config: DataConfig, out: LeftOut | None = None
) -> Iterator[Document]:
  """Yields the documents of all sources of a config, one after the other.

  With `data.sources` a name begins with its source; else as `documents` does.
  """
  if not config.sources:
    yield from documents(config.path, out)
    return
  for path in config.sources:
    for doc in documents(path, out):
      yield Document(f'{path}{MARK}{doc.name}', doc.text)


def _read(
  found: Iterable[corpus_files.File], out: LeftOut, *, whole: bool = True
) -> Iterator[Document]:
  """Yields the documents of files; counts records without text in `out`."""
  for file in found:
    out.read += 1
    stem = os.fsencode(file.name).decode('utf-8', 'backslashreplace')
    for place, text in readers.texts(file, whole=whole):
      if text is None:
        out.add(left_out.NULL, file.name)
      elif text:
        yield Document(stem + place, text)


class Digest:
  """Computes a hash of the names and texts of documents, in order."""

  def __init__(self):
    """Begins with no document."""
    self._sha256 = hashlib.sha256()

  def add(self, doc: Document) -> None:
    """Adds the next document."""
    # Hashed one by one, so that no text can pass for a name.
    for part in doc:
      self._sha256.update(hashlib.sha256(part.encode()).digest())

  def hexdigest(self) -> str:
    """Returns the SHA-256 so far, 64 hex digits."""
    return self._sha256.hexdigest()


def corpus_sha256(docs: Iterable[Document]) -> str:
  """Returns a hash of all names and texts, in order; 64 hex digits."""
  digest = Digest()
  for doc in docs:
    digest.add(doc)
  return digest.hexdigest()


def unit_hash(*parts: str) -> float:
  """Returns a fixed pseudo-random number in [0, 1) of some strings."""
  digest = hashlib.sha256('\0'.join(parts).encode()).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48  # exact in a double


def held_out_hash(text: str) -> float:
  """Returns the fraction above which a document of that text is held out."""
  return unit_hash('held out', text)


def is_held_out(text: str, fraction: float) -> bool:
  """Returns whether a document of that text is kept from training.

  The text decides, not the name: copies of a document are on one side.
  """
  return held_out_hash(text) < fraction
