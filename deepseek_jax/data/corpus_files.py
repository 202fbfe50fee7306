"""Finds the files under data.path that are text to be trained on.

Hidden files and folders, whose names begin with a dot, are no part of a corpus.
Whatever else is there is either read or named in LeftOut. A file or folder that
several links lead to is read once.
"""

import fnmatch
import mimetypes
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from deepseek_jax.data import datasets, left_out, readers
from deepseek_jax.data.left_out import LeftOut
from deepseek_jax.data.readers import File
from deepseek_jax.errors import InputError

# They hold text or records, though their first bytes are not text.
_CONTAINERS = {
  '.7z', '.avro', '.br', '.bz2', '.db', '.doc', '.docx', '.epub', '.feather',
  '.gz', '.h5', '.hdf5', '.lance', '.lz4', '.mds', '.odt', '.orc', '.pdf',
  '.rar', '.sqlite', '.tar', '.tbz', '.tfrecord', '.tfrecords', '.tgz', '.txz',
  '.xz', '.zip', '.zst',
}  # fmt: skip


class _Found(NamedTuple):
  """Describes a regular file under the root."""

  parts: tuple[str, ...]  # of the path below the root; sort as trees do
  path: str
  real: str  # without links
  size: int


def find(root: str, out: LeftOut) -> list[File]:
  """Returns the files of a folder that are read, in the order of their paths.

  Raises InputError for what can't be read, and if more is left out than read.
  """
  found = sorted(_walk(root, (), out))
  files = {each.parts: _file(each) for each in found}
  unclear = {parts for parts, file in files.items() if _is_unclear(file)}
  records = {
    parts
    for parts, file in files.items()
    if file.kind in readers.RECORDS and parts not in unclear
  }
  rules = datasets.Rules({f.parts: f.path for f in found}, records)
  read, seen = [], set()
  for each in found:
    file = files[each.parts]
    # By rule, then by what the file is: the first reason counts.
    reason = rules.reason(each.parts)
    if not reason and each.parts in unclear:
      reason = left_out.NO_RECORDS
    if not reason and _is_empty(file):
      continue
    if not reason and not file.kind:
      reason = _kind_of_other(file.path)
    if not reason and each.real in seen:
      reason = left_out.AGAIN
    if reason:
      out.add(reason, file.name, file.size)
      continue
    _check_pointer(file)
    seen.add(each.real)
    read.append(file)
  out.check_files(sum(file.size for file in read))
  return read


def _file(found: _Found) -> File:
  """Returns a file with its kind and packing, by its name."""
  kind, packed = readers.kind_of(found.parts[-1])
  return File(found.path, '/'.join(found.parts), kind, packed, found.size)


def one(path: str) -> File:
  """Returns the file that data.path names; InputError if it is not read."""
  try:
    status = os.stat(path)
  except OSError as error:
    raise readers.unreadable(path, error) from error
  shown = left_out.shown(path)
  if not stat.S_ISREG(status.st_mode):
    raise InputError(
      f'data.path={shown!r} is no regular file: give a file or a directory'
    )
  name = os.path.basename(path)
  file = _file(_Found((name,), path, path, status.st_size))
  if not file.kind:
    raise InputError(
      f'data.path={shown!r} is not one of {readers.KINDS}: convert it'
    )
  _check_pointer(file)
  if _is_unclear(file):
    raise InputError(
      f'data.path={shown!r} is {left_out.NO_RECORDS}: write one object a line'
    )
  return file


def modules(root: str, skip: tuple[str, ...]) -> list[File]:
  """Returns every .py file under `root` whose names match none of `skip`."""
  found = sorted(_walk(root, skip, LeftOut(root)))
  return [_file(each) for each in found if each.parts[-1].endswith('.py')]


def _walk(root: str, skip: tuple[str, ...], out: LeftOut) -> Iterator[_Found]:
  """Yields regular files; links are followed, but no folder is read twice."""
  above = os.path.realpath(root) + os.sep
  seen = set()
  for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
    real, below = os.path.realpath(folder), os.path.relpath(folder, root)
    parts = () if below == os.curdir else tuple(below.split(os.sep))
    folders[:] = sorted(name for name in folders if _wanted(name, skip))
    reason = None
    if real in seen:
      reason = left_out.AGAIN
    elif parts and above.startswith(real.rstrip(os.sep) + os.sep):
      reason = left_out.ABOVE
    reason = reason or datasets.folder_reason(folder, folders, names)
    if reason:
      out.add(reason, '/'.join(parts or (os.curdir,)) + '/')
      folders[:] = []
      continue
    seen.add(real)
    datasets.keep_one_revision(folder, parts, folders, out)
    for name in sorted(name for name in names if _wanted(name, skip)):
      found = _regular(folder, real, (*parts, name), out)
      if found:
        yield found


def _regular(
  folder: str, real: str, parts: tuple[str, ...], out: LeftOut
) -> _Found | None:
  """Returns the file of that name in a folder; None for no regular file."""
  path = os.path.join(folder, parts[-1])
  try:
    status = os.stat(path)
  except OSError as error:
    if readers.kind_of(parts[-1])[0]:
      _raise(error)
    status = None  # a link to nothing
  if not status or not stat.S_ISREG(status.st_mode):
    out.add(left_out.SPECIAL, '/'.join(parts))
    return None
  link = os.path.islink(path)
  real = os.path.realpath(path) if link else os.path.join(real, parts[-1])
  return _Found(parts, path, real, status.st_size)


def _wanted(name: str, skip: tuple[str, ...]) -> bool:
  """Returns whether a name is neither hidden nor skipped."""
  hidden = name.startswith('.') or name == '__pycache__'
  return not hidden and not any(fnmatch.fnmatch(name, s) for s in skip)


def _raise(error: OSError) -> NoReturn:
  """Raises InputError for what the system does not let be read."""
  raise readers.unreadable(error.filename, error) from error


def _kind_of_other(path: str) -> str:
  """Returns why a file is left out whose name says nothing of text."""
  low = os.path.basename(path).lower()
  # As in x.tfrecord-00000-of-00001.
  if not _CONTAINERS.isdisjoint(re.findall(r'\.[a-z0-9]+', low)):
    return left_out.UNREAD
  media = (mimetypes.guess_type(low)[0] or '').partition('/')[0]
  if media in ('image', 'audio', 'video', 'font'):
    return left_out.NOT_TEXT
  head = readers.head(path, 4096)
  try:
    head.decode('utf-8')
  except UnicodeDecodeError as error:
    if error.start < len(head) - 3:  # else a character is cut in two
      return left_out.NOT_TEXT
  return left_out.NOT_TEXT if b'\0' in head else left_out.UNREAD


def _is_empty(file: File) -> bool:
  """Returns whether there is no text in a file; empty records are damaged."""
  text = file.kind in ('', *readers.TEXT)
  return text and not file.size and not file.packed


def _is_unclear(file: File) -> bool:
  """Returns whether a .json file holds no records of text."""
  if file.kind != '.json' or _is_pointer(file):
    return False
  return not readers.has_records(file)


def _is_pointer(file: File) -> bool:
  """Returns whether it is what git-lfs leaves in place of a file."""
  return file.size < 1024 and readers.head(file.path, 64).startswith(
    b'version https://git-lfs.github.com/spec/'
  )


def _check_pointer(file: File) -> None:
  """Raises InputError for a file that git-lfs has not fetched."""
  if _is_pointer(file):
    raise InputError(
      f'data.path: {left_out.shown(file.path)} is a git-lfs pointer, not the'
      ' file itself: fetch it (git lfs pull) or take it away'
    )
