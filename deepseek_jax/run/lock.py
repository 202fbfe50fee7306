"""One run at a time in a folder: a lock that the kernel frees with its holder.

Readers of a folder take none. The lock lasts as long as the process, however
that ends; a process may take it again. Of a run of several processes the first
has it, so two hosts meet only where their file system shares locks.
"""

import os
import socket
from pathlib import Path

from deepseek_jax import say
from deepseek_jax.errors import InputError, naming

FILE = '.lock'
_held: dict[tuple[int, int], int] = {}  # device and inode -> open file


def take(folder: Path) -> None:
  """Keeps other runs out of `folder`; warns where locks are not supported.

  Raises:
    InputError: another process has it.
  """
  path = folder / FILE
  # Before it is opened: on NFS closing a second file would free the first.
  if path.exists() and _key(os.stat(path)) in _held:
    return
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    _lock(file)
  except (BlockingIOError, PermissionError):
    holder = os.read(file, 200).decode(errors='replace').strip()
    os.close(file)
    raise InputError(
      f'workdir {folder}: a run is under way there ({holder or "unknown"});'
      ' wait for its end, or choose another --workdir'
    ) from None
  except OSError as error:
    os.close(file)
    say.warn(
      f'workdir {folder}: cannot be locked ({error.strerror}); see that no'
      ' other run is started there'
    )
    return
  holder = f'process {os.getpid()} on {socket.gethostname()}\n'
  with naming(path):
    os.ftruncate(file, 0)
    os.write(file, holder.encode())
  _held[_key(os.fstat(file))] = file


def _lock(file: int) -> None:
  try:
    import fcntl
  except ImportError:
    raise OSError(0, 'this system has no flock') from None
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _key(status: os.stat_result) -> tuple[int, int]:
  return status.st_dev, status.st_ino
