"""Hashes content to tell one conversion's source from another's.

Two checkpoints of one architecture have the same files with the same sizes, so
only their bytes tell them apart. A file up to WHOLE bytes is hashed whole; of
a larger safetensors file the header, every tensor up to SMALL bytes and BLOCKS
places of every other one. A fine-tune, a merge or another quantisation shows
there; a change of single rows of a huge matrix need not.
"""

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.hf import safetensors_io

WHOLE = 64 << 20  # bytes of a file
SMALL = 64 << 10  # bytes of a tensor
BLOCKS, BLOCK = 16, 4 << 10  # places of a larger tensor, bytes of each


def of_folder(folder: str) -> dict[str, Any]:
  """Returns {file: [bytes, sha256]} of config.json and the weights in use.

  Raises InputError for a file that is missing or damaged.
  """
  names = ['config.json', *safetensors_io.shards(folder)]
  return {name: of_file(os.path.join(folder, name)) for name in names}


def of_file(path: str) -> list:
  """Returns [bytes, sha256] of a file, of a large one by samples."""
  try:
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, 'rb', buffering=0) as file:
      for start, length in _places(path, size):
        digest.update(_read(file.fileno(), start, length, path))
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from None
  return [size, digest.hexdigest()]


def of_variables(variables: Mapping[str, Any]) -> str:
  """Returns the sha256 of a tree of arrays: their paths, dtypes and bytes."""
  digest = hashlib.sha256()
  for path, array in jax.tree.leaves_with_path(variables):
    array = np.asarray(array)
    about = f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'
    digest.update(about.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _places(path: str, size: int) -> Iterator[tuple[int, int]]:
  """Yields (start, length) of the bytes that are hashed."""
  if size <= WHOLE or not path.endswith('.safetensors'):
    for start in range(0, size, WHOLE):
      yield start, min(WHOLE, size - start)
    return
  entries = safetensors_io.read_header(path).values()
  with open(path, 'rb') as file:
    yield 0, 8 + struct.unpack('<Q', file.read(8))[0]
  for entry in sorted(entries, key=lambda e: e.start):
    if entry.nbytes <= SMALL:
      yield entry.start, entry.nbytes
      continue
    # Evenly spaced, the first and last bytes of the tensor included.
    step = (entry.nbytes - BLOCK) / (BLOCKS - 1)
    for i in range(BLOCKS):
      yield entry.start + math.floor(i * step), BLOCK


def _read(file: int, start: int, length: int, path: str) -> bytes:
  """Returns `length` bytes from `start` on; InputError where the file ends."""
  parts = []
  while length:
    data = os.pread(file, length, start)
    if not data:
      raise InputError(f'{path}: truncated while it was read')
    parts.append(data)
    start, length = start + len(data), length - len(data)
  return b''.join(parts)


def difference(there: Any, here: Any, path: str = '') -> str | None:
  """Returns the dotted path of the first value that differs; None if none."""
  if isinstance(there, dict) and isinstance(here, dict):
    for key in dict.fromkeys([*here, *there]):
      inner = f'{path}.{key}' if path else str(key)
      if key not in there or key not in here:
        return inner
      found = difference(there[key], here[key], inner)
      if found:
        return found
    return None
  return None if there == here else path
