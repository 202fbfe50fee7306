"""Records what a filled store holds: size and SHA-256 of every file.

Each process that fills a store writes a manifest of its chunks and of the
files that describe them, `manifest-0-of-1.json` where it works alone. A store
is complete when all manifests of one such set are there. (tensorstore returns
flipped bytes of a chunk without notice.)
"""

import hashlib
import json
import os
import re
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.files import load_json
from deepseek_jax.hf import record

_NAME = re.compile(r'manifest-(\d+)-of-(\d+)\.json')
_CHUNK = 1 << 22


def write(folder: str, files: list[str], process: int, processes: int) -> None:
  """Writes the manifest of `files`, paths below the folder, all complete."""
  listed = {name: hashed(os.path.join(folder, name)) for name in files}
  fields = {'files': listed, 'sha256': _seal(listed)}
  path = os.path.join(folder, _name(process, processes))
  record.write_json(path, fields)


def _name(process: int, processes: int) -> str:
  """Returns the file name of a manifest."""
  return f'manifest-{process}-of-{processes}.json'


def read(folder: str) -> dict[str, list] | None:
  """Returns {path: [bytes, sha256]} of a complete store; None if it is not.

  Raises InputError for a manifest that is damaged.
  """
  sets: dict[int, set] = {}
  for match in filter(None, map(_NAME.fullmatch, sorted(os.listdir(folder)))):
    sets.setdefault(int(match[2]), set()).add(int(match[1]))
  for count, processes in sets.items():
    if processes == set(range(count)):
      out: dict[str, list] = {}
      for process in range(count):
        out |= _read(
          os.path.join(folder, f'manifest-{process}-of-{count}.json')
        )
      return out
  return None


def _read(path: str) -> dict[str, list]:
  """Returns the entries of a manifest; InputError where it is damaged."""
  fields = load_json(path, 1 << 30)
  files = fields.get('files')
  whole = isinstance(files, dict) and fields.get('sha256') == _seal(files)
  if not whole or not all(map(_is_entry, files.values())):
    raise InputError(f'{path}: is damaged; remove the store and convert again')
  return files


def _is_entry(wanted: Any) -> bool:
  """Returns whether a JSON value is [size, hash]."""
  return isinstance(wanted, list) and [*map(type, wanted)] == [int, str]


def check(folder: str, name: str, wanted: list, *, content: bool) -> None:
  """Raises InputError unless a file is as it was written.

  With `content` its bytes are hashed, else only their number is compared.
  """
  path = os.path.join(folder, name)
  try:
    size = os.path.getsize(path)
    if size != wanted[0]:
      what = f'has {size} bytes, {wanted[0]} were written'
    elif content and hashed(path) != wanted:
      what = 'has another SHA-256 than when it was written'
    else:
      return
  except OSError as error:
    what = f'cannot be read: {error.strerror}'
  raise InputError(f'{path}: {what}; remove the store and convert again')


def hashed(path: str) -> list:
  """Returns [bytes, sha256] of a file."""
  digest, size = hashlib.sha256(), 0
  with open(path, 'rb') as file:
    while data := file.read(_CHUNK):
      digest.update(data)
      size += len(data)
  return [size, digest.hexdigest()]


def _seal(files: dict) -> str:
  """Returns the SHA-256 of the entries themselves."""
  return hashlib.sha256(json.dumps(files).encode()).hexdigest()
