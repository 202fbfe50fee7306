"""Documents: real text without a download, or the user's own files.

A document is a name and a text. The order is that of the sorted names; the
split into training and held-out documents looks at the name alone, so adding
documents moves no other one across it.
"""

import fnmatch
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deepseek_jax.errors import InputError

TEXT = ('.txt', '.py', '.md')
RECORDS = ('.jsonl', '.parquet')
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
_PIECE = 16384  # characters; about the mean length of a stdlib module


class Document(NamedTuple):
  name: str  # unique in its corpus; relative to the path of the corpus
  text: str


def documents(path: str) -> Iterator[Document]:
  """Yields the non-empty documents under `path`, in the order of their names.

  A text file given by itself is cut into documents of about 16,000 characters
  at blank lines, so that some of it can be held out. Raises InputError if the
  path is missing or of an unknown kind; reading raises it for text that isn't
  UTF-8 and for a record without a 'text' field.
  """
  if path == STDLIB:
    root = sysconfig.get_paths()['stdlib']
    return _directory(root, ('.py',), _STDLIB_SKIP)
  root = os.path.expanduser(path)
  if not os.path.exists(root):
    raise InputError(
      f"data.path={path!r} does not exist: give 'stdlib', a file or a directory"
    )
  if os.path.isdir(root):
    return _directory(root, TEXT + RECORDS, ())
  if not _has(root, TEXT + RECORDS):
    kinds = ' '.join(TEXT + RECORDS)
    raise InputError(f'data.path={path!r} is not one of {kinds}: convert it')
  name = os.path.basename(root)
  if _has(root, RECORDS):
    return _read(root, name)
  return _pieces(name, _text(root))


class Digest:
  """Hash of the names and texts of documents, in order."""

  def __init__(self):
    self._sha256 = hashlib.sha256()

  def add(self, doc: Document) -> None:
    # Hashed one by one, so that no text can pass for a name.
    for part in doc:
      self._sha256.update(hashlib.sha256(part.encode()).digest())

  def hexdigest(self) -> str:
    return self._sha256.hexdigest()


def corpus_sha256(docs: Iterable[Document]) -> str:
  """Hash of all names and texts, in order; 64 hex digits."""
  digest = Digest()
  for doc in docs:
    digest.add(doc)
  return digest.hexdigest()


def unit_hash(*parts: str) -> float:
  """A fixed pseudo-random number in [0, 1) of some strings."""
  digest = hashlib.sha256('\0'.join(parts).encode()).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48  # exact in a double


def held_out_hash(name: str) -> float:
  """The fraction above which a document of that name is held out."""
  return unit_hash('held out', name)


def is_held_out(name: str, fraction: float) -> bool:
  """Whether the document of that name is kept from training."""
  return held_out_hash(name) < fraction


def _directory(root, suffixes, skip):
  for path in sorted(_files(root, suffixes, skip)):
    yield from _read(os.path.join(root, *path), '/'.join(path))


def _files(root, suffixes, skip):
  """Paths of the files under `root` as tuples, which sort as trees do."""
  seen = set()  # links to folders are followed, but no folder is read twice
  for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
    if os.path.realpath(folder) in seen:
      folders[:] = []
      continue
    seen.add(os.path.realpath(folder))
    folders[:] = sorted(name for name in folders if _wanted(name, skip))
    parts = os.path.relpath(folder, root).split(os.sep)
    parts = () if parts == ['.'] else tuple(parts)
    for name in names:
      if _has(name, suffixes) and _wanted(name, skip):
        yield (*parts, name)


def _has(name, suffixes):
  """Whether a file is of one of these kinds; 'A.TXT' is '.txt', too."""
  return name.lower().endswith(suffixes)


def _wanted(name, skip):
  hidden = name.startswith('.') or name == '__pycache__'
  return not hidden and not any(fnmatch.fnmatch(name, s) for s in skip)


def _read(path, name):
  if _has(path, '.jsonl'):
    docs = _jsonl(path, name)
  elif _has(path, '.parquet'):
    docs = _parquet(path, name)
  else:
    docs = [Document(name, _text(path))]
  return (doc for doc in docs if doc.text)


def _pieces(name, text):
  start, number = 0, 0
  while start < len(text):
    end = start + _PIECE
    for mark in ('\n\n', '\n'):
      at = text.find(mark, end, end + _PIECE)
      if at >= 0:
        end = at + len(mark)
        break
    yield Document(f'{name}:{number}', text[start:end])
    start, number = end, number + 1


def _text(path):
  """Exactly the file's characters: line ends are not translated."""
  with _opened(path) as file:
    return _utf8(file.read(), path)


def _opened(path):
  try:
    return open(path, 'rb')
  except OSError as error:
    _raise(error)


def _raise(error):
  raise InputError(
    f'data.path: cannot read {error.filename} ({error.strerror}): '
    'make it readable or take it away'
  ) from error


def _utf8(data, where):
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise InputError(
      f'data.path: {where} is not UTF-8 (byte {error.start}): '
      'convert it (iconv -t utf-8) or take it away'
    ) from error


def _jsonl(path, name):
  with _opened(path) as file:
    for number, line in enumerate(file, 1):
      where = f'{path} line {number}'
      if line.strip():
        yield Document(f'{name}:{number}', _record(_utf8(line, where), where))


def _record(line, where):
  try:
    record = json.loads(line)
  except RecursionError as error:
    raise InputError(
      f'data.path: {where} is nested too deeply to be read: take it out'
    ) from error
  except ValueError as error:
    raise InputError(
      f'data.path: {where} is not JSON ({error}): write one object a line'
    ) from error
  text = record.get('text') if isinstance(record, dict) else None
  return _checked(text, where)


def _parquet(path, name):
  import pyarrow

  try:
    for number, text in enumerate(_column(path)):
      yield Document(f'{name}:{number}', _checked(text, f'{path} row {number}'))
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise InputError(
      f'data.path: {path} is not a sound parquet file of UTF-8 text: '
      'write it again or take it away'
    ) from error


def _column(path):
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(path) as file:
    names = file.schema_arrow.names
    if 'text' not in names:
      raise InputError(
        f"data.path: {path} has no column 'text' but {', '.join(names)}: "
        'rename one'
      )
    for batch in file.iter_batches(columns=['text']):
      yield from batch.column(0).to_pylist()


def _checked(text, where):
  if not isinstance(text, str):
    raise InputError(f"data.path: {where} has no string 'text': add the field")
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair
    raise InputError(
      f'data.path: {where} is not valid Unicode (character {error.start}): '
      'mend or remove it'
    ) from error
  return text
