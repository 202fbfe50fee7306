"""Reads and writes safetensors, piece by piece, trusting no file.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte
range) and the bytes. Every field of the header is checked before a byte is
read: a hostile or damaged file gives an InputError, never a wrong array.
"""

import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax import files
from deepseek_jax.errors import InputError

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'

DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'I64': np.dtype('<i8'),
  'I32': np.dtype('<i4'),
  'I16': np.dtype('<i2'),
  'I8': np.dtype('i1'),
  'U8': np.dtype('u1'),
  'BOOL': np.dtype('?'),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
  """Describes where a tensor lies."""

  file: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int  # byte offset in the file

  @property
  def nbytes(self) -> int:
    """Returns the bytes of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str) -> dict[str, Entry]:
  """Returns the checked tensors of one file.

  Raises:
    InputError: the file is missing, truncated or damaged.
  """
  try:
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
      prefix = file.read(8)
      length = struct.unpack('<Q', prefix)[0] if len(prefix) == 8 else -1
      if length > MAX_HEADER:
        raise InputError(
          f'{path}: header of {length} bytes; at most {MAX_HEADER} are read'
        )
      if length < 2 or 8 + length > size:
        raise InputError(f'{path}: truncated, or not a safetensors file')
      header = files.parse_json(file.read(length), f'{path}: header')
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from None
  header.pop('__metadata__', None)
  first = 8 + length
  entries = {
    name: _entry(path, name, fields, first, size)
    for name, fields in header.items()
  }
  _check_cover(path, entries, first, size)
  return entries


def _entry(path: str, name: str, fields: Any, first: int, size: int) -> Entry:
  """Returns a tensor of a header, every field checked."""
  where = f'{path}: tensor {name!r}'
  if not isinstance(fields, dict) or set(fields) != {
    'dtype',
    'shape',
    'data_offsets',
  }:
    raise InputError(f'{where}: must have dtype, shape and data_offsets')
  dtype, shape = fields['dtype'], fields['shape']
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise InputError(f'{where}: unknown dtype {dtype!r}; known: {[*DTYPES]}')
  offsets = fields['data_offsets']
  if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
    raise InputError(f'{where}: shape {shape!r}, data_offsets {offsets!r}')
  start, end = offsets
  entry = Entry(path, DTYPES[dtype], tuple(shape), first + start)
  if start > end or first + end > size:
    raise InputError(
      f'{where}: data_offsets {offsets} lie outside of its {size - first}'
      ' bytes of data; the file is truncated or damaged'
    )
  if entry.nbytes != end - start:
    raise InputError(
      f'{where}: {end - start} bytes; {dtype}{shape} takes {entry.nbytes}'
    )
  return entry


def _naturals(values: Any) -> bool:
  """Returns whether a JSON value is a list of integers from 0 up."""
  return isinstance(values, list) and all(
    type(v) is int and v >= 0 for v in values
  )


def _check_cover(
  path: str, entries: Mapping[str, Entry], first: int, size: int
) -> None:
  """Raises InputError unless tensors follow each other and fill the file."""
  end = first
  for name, entry in sorted(entries.items(), key=lambda e: e[1].start):
    if not entry.nbytes:
      continue
    if entry.start != end:
      what = 'overlaps another' if entry.start < end else 'leaves a hole before'
      raise InputError(f'{path}: tensor {name!r} {what}; the file is damaged')
    end = entry.start + entry.nbytes
  if end != size:
    raise InputError(
      f'{path}: {size - end} bytes belong to no tensor; the file is damaged'
    )


def shards(folder: str) -> list[str]:
  """Returns the files of a checkpoint folder, by its index or the single one.

  Raises InputError if it has neither.
  """
  index = os.path.join(folder, INDEX)
  if not os.path.exists(index):
    if not os.path.exists(os.path.join(folder, SINGLE)):
      raise InputError(
        f'{folder}: holds neither {SINGLE} nor {INDEX}; other formats are not'
        ' read'
      )
    return [SINGLE]
  return sorted(set(map(_shard_name, _weight_map(index).values())))


def _weight_map(index: str) -> dict:
  """Returns the weight_map of an index; InputError without one."""
  listed = files.load_json(index).get('weight_map')
  if not isinstance(listed, dict) or not listed:
    raise InputError(f'{index}: has no weight_map')
  return listed


def read_folder(folder: str) -> dict[str, Entry]:
  """Returns all tensors of a checkpoint folder, by index or single file."""
  index, parts = os.path.join(folder, INDEX), shards(folder)
  if not os.path.exists(index):
    return read_header(os.path.join(folder, SINGLE))
  listed = _weight_map(index)
  entries = {}
  for file in parts:
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
      raise InputError(f'{index}: names {file}, which is missing')
    for name, entry in read_header(path).items():
      if listed.get(name) != file:
        raise InputError(f'{path}: tensor {name!r}: {INDEX} does not list it')
      entries[name] = entry
  lacking = sorted(set(listed) - set(entries))
  if lacking:
    name = lacking[0]
    raise InputError(f'{index}: tensor {name!r} is not in {listed[name]}')
  return entries


def _shard_name(name: Any) -> str:
  """Returns the name of a shard; InputError unless it is a plain file name."""
  if (
    not isinstance(name, str)
    or not name.endswith('.safetensors')
    or name != os.path.basename(name)
    or '\\' in name
    or '\0' in name
  ):
    raise InputError(
      f'{INDEX}: {name!r}: a shard must be a .safetensors file in this folder'
    )
  return name


def read(
  entry: Entry,
  start: int = 0,
  stop: int | None = None,
  columns: slice | None = None,
) -> np.ndarray:
  """Returns a tensor, its rows start:stop, or some columns of a matrix.

  Reads no other bytes.
  """
  if not entry.shape:
    return _filled(entry, entry.start, ())
  rows = (entry.shape[0] if stop is None else stop) - start
  width = math.prod(entry.shape[1:]) * entry.dtype.itemsize
  begin = entry.start + start * width
  if columns is None or columns.stop - columns.start == entry.shape[1]:
    return _filled(entry, begin, (rows, *entry.shape[1:]))
  # Some columns of a matrix: a short run of bytes per row.
  count = columns.stop - columns.start
  begin += columns.start * entry.dtype.itemsize
  return _filled(entry, begin, (rows, count), width)


def _filled(
  entry: Entry, begin: int, shape: tuple[int, ...], stride: int = 0
) -> np.ndarray:
  """Returns an array of `shape` read from byte `begin` on.

  With a stride, in bytes, its rows lie so far apart.
  """
  out = np.empty(shape, entry.dtype)
  lines = out if stride else out.reshape(1, -1)
  with open(entry.file, 'rb', buffering=0) as file:
    for i, line in enumerate(lines):
      file.seek(begin + i * stride)
      _fill(file, memoryview(line.view(np.uint8)), entry.file)
  return out


def _fill(file: BinaryIO, view: memoryview, name: str) -> None:
  """Fills a buffer from a file; InputError where the file ends."""
  done = 0
  while done < len(view):
    got = file.readinto(view[done:])
    if not got:
      raise InputError(f'{name}: truncated while it was read')
    done += got


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
  """Returns the bytes before the data, for tensors in this order."""
  fields, start = {}, 0
  for name, (dtype, shape) in tensors.items():
    dtype = np.dtype(dtype)
    end = start + math.prod(shape) * dtype.itemsize
    fields[name] = {
      'dtype': _NAMES[dtype],
      'shape': list(shape),
      'data_offsets': [start, end],
    }
    start = end
  text = json.dumps({'__metadata__': {'format': 'pt'}, **fields}).encode()
  text += b' ' * (-len(text) % 8)  # aligned data, as the reference writes it
  return struct.pack('<Q', len(text)) + text


class Writer:
  """Writes one file whose tensors come row by row, in any order.

  As a context it gives the file its name at the end, complete and on disk, and
  leaves nothing behind after an exception.
  """

  def __init__(
    self, path: str, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
  ) -> None:
    """Opens the file under a temporary name and writes the header.

    Args:
      path: of the file to be.
      tensors: name -> (dtype, shape), in the order of the file.
    """
    # A name of its own: two writers of one file don't meet.
    self._path = path
    self._part = f'{path}.{secrets.token_hex(4)}.part'
    head = header(tensors)
    self._entries, end = {}, len(head)
    for name, (dtype, shape) in tensors.items():
      entry = Entry(self._part, np.dtype(dtype), tuple(shape), end)
      self._entries[name] = entry
      end += entry.nbytes
    self._file = open(self._part, 'wb')  # noqa: SIM115
    self._file.write(head)
    self._file.truncate(end)

  def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
    """Puts `rows` [n ...] of a tensor at its row `start`."""
    entry = self._entries[name]
    if rows.dtype != entry.dtype or rows.shape[1:] != entry.shape[1:]:
      raise ValueError(
        f'{name}: {rows.dtype}{rows.shape} into {entry.dtype}{entry.shape}'
      )
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    self._file.seek(entry.start + start * row)
    self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))

  def __enter__(self) -> 'Writer':
    """Returns the writer."""
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    """Closes the file; removes it after an exception."""
    if kind is None:
      self.close()
    else:
      self._file.close()
      os.remove(self._part)

  def close(self) -> None:
    """Renames the file into place, complete and on disk."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    os.replace(self._part, self._path)
