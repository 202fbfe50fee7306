"""A manifest for a folder of files: what it held when it was written.

The size and SHA-256 of every file, so that a flipped bit, a cut or a lost file
is found and named before anything is read. (orbax returns flipped bytes of
array data without notice.)
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from deepseek_jax.errors import InputError
from deepseek_jax.files import whole

MANIFEST = 'manifest.json'
# Written by orbax after the manifest; carry no data.
_LATER = ('commit_success.txt', '_CHECKPOINT_METADATA')
_CHUNK = 1 << 22
_SMALL = 1 << 20
_SAMPLE = 8  # of the larger files, `sample` reads one in this many
VERIFY = ('full', 'sample', 'off')


def write_manifest(folder: Path) -> None:
  """Writes folder/manifest.json, in one rename, when all files are on disk."""
  files = {
    name: [path.stat().st_size, _sha256(path, sync=True)]
    for name, path in _files(folder).items()
  }
  text = json.dumps({'files': files, 'sha256': _seal(files)}, indent=0)
  with whole(folder / MANIFEST) as scratch, scratch.open('w') as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())


def problem(folder: Path, verify: str = 'full') -> str | None:
  """What is wrong with the folder, naming the file; None if it is whole.

  Args:
    folder: as `write_manifest` left it; further files are of no concern.
    verify: 'full' hashes every file; 'sample' compares all sizes, and hashes
      files up to 1 MiB and every eighth of the larger; 'off' looks at nothing.
  """
  check_choice(verify)
  if verify == 'off':
    return None
  try:
    files = _read(folder)
    wrong = (
      _wrong(folder / name, *expected, hashed=_hashed(verify, n, expected[0]))
      for n, (name, expected) in enumerate(files.items())
    )
    return next(filter(None, wrong), None)
  except (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RecursionError,
  ) as error:
    return f'{folder / MANIFEST} cannot be read ({type(error).__name__})'


def check_choice(verify: str) -> None:
  """InputError unless `verify` is one of full, sample, off."""
  if verify not in VERIFY:
    raise InputError(f'verify = {verify!r}: choose one of {list(VERIFY)}')


def size(folder: Path) -> int:
  """Bytes of all files of a folder, those that no manifest names too."""
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


def _files(folder: Path) -> dict[str, Path]:
  unlisted = {folder / name for name in (MANIFEST, *_LATER)}
  return {
    str(path.relative_to(folder)): path
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path not in unlisted
  }


def _read(folder: Path) -> Mapping[str, list]:
  written = json.loads((folder / MANIFEST).read_text())
  if written['sha256'] != _seal(written['files']):
    raise ValueError('the manifest itself was changed')
  return written['files']


def _seal(files: Mapping[str, list]) -> str:
  return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _hashed(verify: str, number: int, length: int) -> bool:
  return verify == 'full' or length <= _SMALL or number % _SAMPLE == 0


def _wrong(path: Path, length: int, sha256: str, *, hashed: bool) -> str | None:
  try:
    found = path.stat().st_size
    if found != length:
      return f'{path} has {found} bytes, {length} were written'
    if hashed and _sha256(path) != sha256:
      return f'{path} has another SHA-256 than when it was written'
  except OSError as error:
    return f'{path}: {error.strerror}'
  return None


def _sha256(path: Path, *, sync: bool = False) -> str:
  digest = hashlib.sha256()
  with path.open('rb') as stream:
    while data := stream.read(_CHUNK):
      digest.update(data)
    if sync:
      os.fsync(stream.fileno())
  return digest.hexdigest()
