"""Keeps the record of a conversion in the folder that it writes.

`.convert.json` records what the work is (source, format, config.json), which
files are done, with their hashes, and whether all are. So a killed conversion
goes on, another one is refused by name, and a folder that holds half of one
model and half of another is never taken for a checkpoint.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.files import load_json
from deepseek_jax.hf import identity, safetensors_io

FILE = '.convert.json'
_PART = re.compile(r'(model|config)\b.*\.[0-9a-f]{8}\.part')


def scratch(path: str) -> str:
  """Returns a name beside `path` that no other writer has."""
  return f'{path}.{secrets.token_hex(4)}.part'


def write_json(path: str, fields: Mapping[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  part = scratch(path)
  with open(part, 'w', encoding='utf-8') as file:
    json.dump(fields, file, indent=2)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, path)


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
  """Keeps other conversions out of a folder as long as the block runs.

  Raises InputError if another process writes there. Where the file system has
  no locks, files still appear whole, for their parts have names of their own.
  """
  file = os.open(folder, os.O_RDONLY)
  try:
    if _locked(file, folder):
      for name in filter(_PART.fullmatch, os.listdir(folder)):
        os.remove(os.path.join(folder, name))  # what a killed one left
    yield
  finally:
    os.close(file)


def _locked(file: int, folder: str) -> bool:
  """Locks a folder; returns False where the file system has no locks.

  Raises:
    InputError: another process holds the lock.
  """
  try:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise InputError(
      f'{folder}: another conversion is writing there; wait for its end, or'
      ' convert to another folder'
    ) from None
  except (ImportError, OSError):
    return False
  return True


class Record:
  """Keeps the record of a folder while a conversion runs.

  Hold `alone` around it.

  Attributes:
    folder: that is written.
    work: what identifies the conversion.
  """

  def __init__(self, folder: str, work: Mapping[str, Any], *, replace: bool):
    """Begins the work, or goes on with it.

    Args:
      folder: exists.
      work: JSON values that identify the numbers and how they are written.
      replace: begin anew whatever is there.

    Raises:
      InputError: the folder holds other work, or weights of unknown origin.
    """
    # As JSON reads it back, so that tuples equal the lists of a record.
    self.folder, self.work = folder, json.loads(json.dumps(work))
    self._path = os.path.join(folder, FILE)
    self._files: dict[str, list] = {}
    if not replace:
      self._go_on()
    self._write(complete=False)

  def _go_on(self) -> None:
    """Reads the record that is there; InputError where it is of other work."""
    if not os.path.exists(self._path):
      for name in sorted(os.listdir(self.folder)):
        if name.endswith('.safetensors') or name in (
          safetensors_io.INDEX,
          'config.json',
        ):
          raise InputError(
            f'{self.folder}: holds {name}, which no conversion here has'
            f' written ({FILE} is missing); convert to another folder'
          )
      return
    there = load_json(self._path)
    other = identity.difference(there.get('work'), self.work, 'work')
    if other:
      raise InputError(
        f'{self.folder}: was begun with another'
        f' {other.removeprefix("work.")}; remove it, or convert to another'
        ' folder'
      )
    files = there.get('files')
    self._files = dict(files) if isinstance(files, dict) else {}

  def finished(self, name: str) -> bool:
    """Returns whether a file is done, comparing its content.

    Raises InputError if it was changed since.
    """
    path = os.path.join(self.folder, name)
    if name not in self._files or not os.path.exists(path):
      return False
    if identity.of_file(path) != self._files[name]:
      raise InputError(
        f'{path}: is not what the conversion wrote; remove it to have it'
        ' written again'
      )
    return True

  def done(self, name: str) -> None:
    """Records that a file is complete."""
    self._files[name] = identity.of_file(os.path.join(self.folder, name))
    self._write(complete=False)

  def close(self) -> None:
    """Records that all files are complete."""
    self._write(complete=True)

  def _write(self, *, complete: bool) -> None:
    """Writes the record to the folder."""
    fields = {'work': self.work, 'complete': complete, 'files': self._files}
    write_json(self._path, fields)


def check(folder: str) -> None:
  """Raises InputError if a conversion into the folder was not finished."""
  path = os.path.join(folder, FILE)
  if not os.path.exists(path):
    return
  if load_json(path).get('complete') is not True:
    raise InputError(
      f'{folder}: was not written to the end ({FILE}); run its conversion again'
    )
