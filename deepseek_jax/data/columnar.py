"""Reads the column 'text' of Parquet and Arrow files, a few rows at a time."""

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from deepseek_jax.errors import InputError

_ROWS = 8  # at a time: a row may be long
_BUFFER = 1 << 20  # bytes


def parquet(stream: BinaryIO, where: str) -> Iterator[Any]:
  """Yields columns of a few rows; pages are read as they are needed."""
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(
    stream, buffer_size=_BUFFER, pre_buffer=False
  ) as file:
    _check_column(file.schema_arrow.names, where)
    for batch in file.iter_batches(batch_size=_ROWS, columns=['text']):
      yield batch.column(0)


def arrow(stream: BinaryIO, where: str) -> Iterator[Any]:
  """Yields the columns of an IPC stream or file, mapped and not read in."""
  import pyarrow

  if not os.fstat(stream.fileno()).st_size:
    raise pyarrow.ArrowInvalid('empty')
  mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
  source = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
  # The file format begins with this mark, the stream format does not.
  if mapped[:6] == b'ARROW1':
    file = pyarrow.ipc.open_file(source)
    _check_column(file.schema.names, where)
    batches = map(file.get_batch, range(file.num_record_batches))
  else:
    batches = pyarrow.ipc.open_stream(source)
    _check_column(batches.schema.names, where)
  for batch in batches:
    yield batch.column(batch.schema.names.index('text'))


def _check_column(names: Sequence[str], where: str) -> None:
  """Raises InputError if there is no column 'text'."""
  if 'text' not in names:
    raise InputError(
      f"data.path: {where} has no column 'text' but {', '.join(names)}: "
      'rename one'
    )
