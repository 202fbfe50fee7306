"""Reads small files that are not trusted; writes files whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.errors import InputError, naming

MAX_JSON = 100_000_000  # bytes, as safetensors limits its headers


def load_json(path: str, limit: int = MAX_JSON) -> dict:
  """Returns the JSON object in a file of at most `limit` bytes."""
  try:
    size = os.path.getsize(path)
    if size > limit:
      raise InputError(f'{path}: {size} bytes; at most {limit} are read')
    with open(path, 'rb') as file:
      return parse_json(file.read(), path)
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from None


def parse_json(data: bytes, where: str) -> dict:
  """Returns a JSON object; a key that occurs twice is refused."""

  def unique(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
      raise ValueError('a key occurs twice')
    return out

  try:
    out = json.loads(data.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: not valid JSON: {error}') from None
  if not isinstance(out, dict):
    raise InputError(f'{where}: holds no JSON object')
  return out


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """Yields a scratch file that takes the place of `path` in the end.

  A crash leaves the old file or the new one; an OSError names the scratch.
  """
  scratch = path.with_suffix('.tmp')
  with naming(scratch):
    yield scratch
  scratch.replace(path)
