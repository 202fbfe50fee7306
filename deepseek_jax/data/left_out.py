"""Reports what lies under data.path and is not read: counted and named.

Some of it is left out by rule: dataset cards, other splits than train, runs.
The rest is text that is there and can't be read; where it outweighs the text
that is read, the path is refused, for training would be on the wrong text.
"""

import os

from deepseek_jax.errors import InputError

_SHOWN = 3  # names for each reason

UNREAD = 'text of a kind that is not read'
NOT_TEXT = 'not text'
NO_RECORDS = "JSON that is no list or lines of records with a 'text'"
CARD = 'dataset card'
DESCRIPTION = 'description of a dataset'
SPLIT = 'another split than train'
CACHE = "a dataset's cache"
REVISION = 'not the revision of refs/main'
MODEL = 'a model in a hub cache'
RUN = "a run's folder"
STORE = 'a token store'
AGAIN = 'read under another name'
ABOVE = 'link to a folder above'
SPECIAL = 'no regular file'
NULL = 'record whose text is null'
_LOST = (UNREAD, NO_RECORDS)  # may be what the user meant to train on


def shown(path: str) -> str:
  """Returns a path in one printable line, bytes that are not UTF-8 as \\xNN."""
  text = os.fsencode(path).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class LeftOut:
  """Collects the files, folders and records that are not read.

  path: what data.path says, for messages.
  read: files that were read.
  """

  def __init__(self, path: str):
    """Begins with nothing left out."""
    self._path = path
    self.read = 0
    self._counts: dict[str, int] = {}
    self._names: dict[str, list[str]] = {}
    self._bytes = 0

  def add(self, reason: str, name: str, size: int = 0) -> None:
    """Counts one; size: its bytes, which weigh if its text is lost."""
    self._counts[reason] = self._counts.get(reason, 0) + 1
    names = self._names.setdefault(reason, [])
    if len(names) <= _SHOWN and name not in names:
      names.append(name)
    if reason in _LOST:
      self._bytes += size

  def __str__(self) -> str:
    """Returns the reasons with counts and first names; '' if there are none."""
    parts = []
    for reason, count in self._counts.items():
      names = [shown(name) for name in self._names[reason]]
      more = ', …' if len(names) > _SHOWN else ''
      parts.append(f'{count} {reason} ({", ".join(names[:_SHOWN])}{more})')
    return '; '.join(parts)

  def line(self) -> str:
    """Returns one line for the user; '' if nothing is left out."""
    return f'data.path={self._path!r}: left out {self}' if str(self) else ''

  def check_files(self, size: int) -> None:
    """Raises InputError if more bytes are lost than the `size` that is read."""
    if self._bytes > size:
      raise InputError(
        f'data.path={self._path!r}: more text is left out than read'
        f' ({self._bytes:,} bytes against {size:,}: {self}); convert it, or'
        ' give a file or folder that holds only what is to be read'
      )

  def check_records(self, documents: int) -> None:
    """Raises InputError if more records have no text than have one."""
    nulls = self._counts.get(NULL, 0)
    if nulls > documents:
      raise InputError(
        f'data.path={self._path!r}: {nulls} records have a null text and'
        f' {documents} a text ({self}): take those records out'
      )
