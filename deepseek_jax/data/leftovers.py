"""Removes folders that a killed build of a token store left in the cache."""

import os
import re
import shutil
import time

_UNFINISHED = re.compile(r'[0-9a-f]{20}\.[0-9a-f]{8}\.tmp')
_DAY = 24 * 3600.0  # seconds; a build that lives writes all the time


def remove(folder: str, age: float = _DAY) -> list[str]:
  """Removes unfinished stores that nobody has written to for a day.

  Args:
    folder: that holds the stores; need not exist.
    age: seconds since the last write to the folder or a file in it.

  Returns:
    The names that were removed. What cannot be removed, or is a link, stays.
  """
  removed = []
  for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
    path = os.path.join(folder, name)
    if not _UNFINISHED.fullmatch(name) or os.path.islink(path):
      continue
    if time.time() - _last_write(path) > age:
      shutil.rmtree(path, ignore_errors=True)
      removed += [] if os.path.exists(path) else [name]
  return removed


def _last_write(path: str) -> float:
  """Returns the time of the last write to a folder or its files.

  It is now, if the folder is going away.
  """
  try:
    with os.scandir(path) as entries:
      times = [entry.stat(follow_symlinks=False).st_mtime for entry in entries]
    return max([os.stat(path).st_mtime, *times])
  except OSError:
    return time.time()
