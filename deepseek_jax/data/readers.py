"""Reads the texts of one file, in bounded memory whatever its size.

A file of text is one text, or pieces of about 16,000 characters where it is
long; a file of records has one text a record, in its field 'text'.
"""

import codecs
import contextlib
import errno
import io
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from deepseek_jax.data import columnar, left_out
from deepseek_jax.errors import InputError

TEXT = ('.txt', '.py', '.md')
LINES = ('.jsonl', '.json')
TABLES = ('.parquet', '.arrow')
RECORDS = LINES + TABLES
PACKED = ('.gz', '.zst')  # of text and lines; tables compress by themselves
KINDS = ' '.join(TEXT + RECORDS) + ' (.gz and .zst of all but the last two)'

_PIECE = 16384  # characters; about the mean length of a stdlib module
_WHOLE = 1 << 24  # characters; a longer text is cut into pieces
_LONGEST = 1 << 26  # bytes of a record
_CHUNK = 1 << 20  # bytes


class File(NamedTuple):
  """Describes a file that is read.

  Attributes:
    path: to open it.
    name: below data.path.
    kind: one of TEXT and RECORDS.
    packed: '' or one of PACKED.
    size: bytes on disk.
  """

  path: str
  name: str
  kind: str
  packed: str
  size: int


def kind_of(name: str) -> tuple[str, str]:
  """Returns (kind, packed) of a file's name, '' for neither.

  Case does not count: 'A.TXT' is '.txt'.
  """
  low = name.lower()
  packed = next((p for p in PACKED if low.endswith(p)), '')
  kinds = TEXT + (LINES if packed else RECORDS)
  low = low.removesuffix(packed)
  return next(((k, packed) for k in kinds if low.endswith(k)), ('', ''))


def texts(
  file: File, *, whole: bool = True
) -> Iterator[tuple[str, str | None]]:
  """Yields (what follows the file's name, text) of each text in a file.

  A record whose text is null gives None. whole: a text file of at most 16
  million characters is one text. Raises InputError where the file can't be
  read.
  """
  if file.kind in TABLES:
    yield from _table(file)
    return
  where = left_out.shown(file.path)
  with _opened(file) as stream:
    if file.kind in TEXT:
      yield from _text(_decoded(stream, where), whole)
    elif file.kind == '.json' and _first(stream) == b'[':
      for number, record in enumerate(_listed(stream, where)):
        yield f':{number}', _text_of(record, f'{where} record {number}')
    else:
      for number, record in _lines(stream, where):
        yield f':{number}', _text_of(record, f'{where} line {number}')


def has_records(file: File) -> bool:
  """Returns whether a .json file is a list or lines of 'text' objects."""
  where = left_out.shown(file.path)
  with _opened(file) as stream:
    if _first(stream) == b'[':
      records = _listed(stream, where)
    else:
      records = (record for _, record in _lines(stream, where))
    try:
      record = next(records, None)
    except InputError:
      return False
  return isinstance(record, dict) and 'text' in record


def head(path: str, size: int) -> bytes:
  """Returns a file's first `size` bytes; InputError if it can't be read."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise OSError(errno.EINVAL, 'it is no regular file', path)
    with open(path, 'rb') as stream:
      return stream.read(size)
  except OSError as error:
    raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> InputError:
  """Returns the InputError for a file that the system does not give."""
  return InputError(
    f'data.path: cannot read {left_out.shown(path)}'
    f' ({error.strerror or error}): make it readable or take it away'
  )


@contextlib.contextmanager
def _opened(file: File) -> Iterator[io.BufferedReader]:
  """Opens a file's bytes, unpacked; names damage and faults of the system."""
  try:
    with open(file.path, 'rb') as raw, _unpacked(raw, file.packed) as stream:
      yield stream
  except (OSError, EOFError, zlib.error) as error:
    if not file.packed or getattr(error, 'filename', None):
      raise unreadable(file.path, error) from error
    raise InputError(
      f'data.path: {left_out.shown(file.path)} is not a sound {file.packed}'
      f' file ({error}): write it again or take it away'
    ) from error


def _unpacked(raw: io.BufferedReader, packed: str) -> Any:
  """Returns the stream of a packed file's contents."""
  if packed and not os.fstat(raw.fileno()).st_size:
    raise EOFError('it is empty')
  if packed == '.gz':
    import gzip

    return gzip.open(raw)
  if packed == '.zst':
    import pyarrow

    return io.BufferedReader(
      pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), 'zstd')
    )
  return raw


def _decoded(stream: BinaryIO, where: str) -> Iterator[str]:
  """Yields exactly the characters: line ends are not translated."""
  decoder, done = codecs.getincrementaldecoder('utf-8')(), 0
  while True:
    chunk = stream.read(_CHUNK)
    # Bytes of a character that the chunk before began.
    held = len(decoder.getstate()[0])
    try:
      yield decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
      raise _not_utf8(where, done - held + error.start) from error
    done += len(chunk)
    if not chunk:
      return


def _text(parts: Iterable[str], whole: bool) -> Iterator[tuple[str, str]]:
  """Yields a text whole, or in numbered pieces where it is long."""
  parts, read, size = iter(parts), [], 0
  while whole and size <= _WHOLE:
    part = next(parts, None)
    if part is None:
      yield '', ''.join(read)
      return
    read.append(part)
    size += len(part)
  for number, text in enumerate(_pieces(itertools.chain(read, parts))):
    yield f':{number}', text


def _pieces(parts: Iterable[str]) -> Iterator[str]:
  """Cuts a text at the first blank line or line end after 16,384 characters."""
  parts, text, ended = iter(parts), '', False
  while text or not ended:
    while not ended and len(text) < 2 * _PIECE:
      part = next(parts, None)
      ended = part is None
      text += part or ''
    start = 0
    while len(text) - start >= 2 * _PIECE or (ended and start < len(text)):
      end = _cut(text, start + _PIECE)
      yield text[start:end]
      start = end
    text = text[start:]


def _cut(text: str, least: int) -> int:
  """Returns where to cut: after a blank line or line end from `least` on."""
  for mark in ('\n\n', '\n'):
    at = text.find(mark, least, least + _PIECE)
    if at >= 0:
      return at + len(mark)
  return least


def _first(stream: io.BufferedReader) -> bytes:
  """Returns the first byte that is no space or byte order mark.

  Skips those before it, and leaves it unread.
  """
  if stream.peek(3)[:3] == codecs.BOM_UTF8:
    stream.read(3)
  while chunk := stream.peek(1):
    left = chunk.lstrip()
    stream.read(len(chunk) - len(left))
    if left:
      return left[:1]
  return b''


def _lines(stream: BinaryIO, where: str) -> Iterator[tuple[int, Any]]:
  """Yields (line, value) of the lines that are not blank."""
  for number in itertools.count(1):
    line = stream.readline(_LONGEST + 1)
    if not line:
      return
    at = f'{where} line {number}'
    _check_length(len(line), at)
    if number == 1:
      line = line.removeprefix(codecs.BOM_UTF8)
    if line.strip():
      yield number, _json(_utf8(line, at), at)


def _json(line: str, where: str) -> Any:
  """Returns the value of a line of JSON; InputError if it is none."""
  try:
    return json.loads(line)
  except RecursionError as error:
    raise _too_deep(where) from error
  except ValueError as error:
    raise InputError(
      f'data.path: {where} is not JSON ({error}): write one object a line'
    ) from error


def _listed(stream: BinaryIO, where: str) -> Iterator[Any]:
  """Yields the values of a JSON list, of which one at a time is in memory."""
  text = _Values(_decoded(stream, where))
  text.take()  # the bracket
  if text.next() == ']':
    return
  for number in itertools.count():
    at = f'{where} record {number}'
    yield text.value(at)
    sign = text.take()
    if sign == ']' and not text.next():
      return
    if sign != ',':
      raise InputError(
        f'data.path: {at} is not followed by a comma or the end of the list:'
        ' mend the file'
      )


class _Values:
  """Reads JSON values that follow each other in a text given in parts."""

  def __init__(self, parts: Iterator[str]):
    """Takes the parts of the text, read as they are needed."""
    self._parts, self._text = parts, ''

  def next(self) -> str:
    """Returns the first character that is not a space; '' at the end."""
    self._text = self._text.lstrip()
    while not self._text and self._more():
      self._text = self._text.lstrip()
    return self._text[:1]

  def take(self) -> str:
    """Returns the first character that is not a space, and skips it."""
    sign = self.next()
    self._text = self._text[1:]
    return sign

  def value(self, where: str) -> Any:
    """Returns the next value; reads on while it may be cut off."""
    self.next()
    while True:
      try:
        value, end = json.JSONDecoder().raw_decode(self._text)
        # A number could go on.
        if end < len(self._text) or isinstance(value, dict | list | str):
          break
        wrong = 'it is cut off'
      except RecursionError as error:
        raise _too_deep(where) from error
      except ValueError as error:
        wrong = error
      _check_length(len(self._text), where)
      if not self._more():
        raise InputError(
          f'data.path: {where} is not JSON ({wrong}): mend or remove it'
        )
    self._text = self._text[end:]
    return value

  def _more(self) -> bool:
    """Reads as much as there is already, so that no text is parsed often."""
    more = ''.join(itertools.islice(self._parts, 1 + len(self._text) // _CHUNK))
    self._text += more
    return bool(more)


def _table(file: File) -> Iterator[tuple[str, str | None]]:
  """Yields the texts of a table's rows, numbered."""
  import pyarrow

  where = left_out.shown(file.path)
  try:
    with open(file.path, 'rb') as stream:
      read = columnar.parquet if file.kind == '.parquet' else columnar.arrow
      rows = itertools.chain.from_iterable(read(stream, where))
      for number, text in enumerate(rows):
        at = f'{where} row {number}'
        yield f':{number}', _text_of({'text': text.as_py()}, at)
  except MemoryError as error:
    raise InputError(
      f'data.path: {where} needs more memory than there is: write it in'
      ' smaller pages'
    ) from error
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    if getattr(error, 'filename', None):
      raise unreadable(file.path, error) from error
    raise InputError(
      f'data.path: {where} is not a sound {file.kind[1:]} file of UTF-8 text:'
      ' write it again or take it away'
    ) from error


def _text_of(record: Any, where: str) -> str | None:
  """Returns the text of a record; None if it is null."""
  text = record.get('text', 0) if isinstance(record, dict) else 0
  if text is None:
    return None
  if not isinstance(text, str):
    raise InputError(f"data.path: {where} has no string 'text': add the field")
  try:
    _check_length(len(text.encode()), where)
  except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair
    raise InputError(
      f'data.path: {where} is not valid Unicode (character {error.start}): '
      'mend or remove it'
    ) from error
  return text


def _check_length(size: int, where: str) -> None:
  """Raises InputError for a record of more than 64 MiB."""
  if size > _LONGEST:
    raise InputError(
      f'data.path: {where} has more than {_LONGEST >> 20} MiB: cut it'
    )


def _utf8(data: bytes, where: str) -> str:
  """Returns bytes as text; InputError if they are not UTF-8."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise _not_utf8(where, error.start) from error


def _not_utf8(where: str, byte: int) -> InputError:
  """Returns the InputError for a byte that is not UTF-8."""
  return InputError(
    f'data.path: {where} is not UTF-8 (byte {byte}): '
    'convert it (iconv -t utf-8) or take it away'
  )


def _too_deep(where: str) -> InputError:
  """Returns the InputError for JSON that is nested too deeply."""
  return InputError(
    f'data.path: {where} is nested too deeply to be read: take it out'
  )
