"""Checks the files that flags name for results, before anything is computed.

What is there is replaced only where it is of the same kind, which the same
command has written and writes again; nothing else of the user's is.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.errors import InputError


def check_page(given: str | os.PathLike, what: str, kicker: str) -> Path:
  """Returns the path of --out, where a page may be written; see `check`.

  Args:
    given: the path.
    what: is written there, in words.
    kicker: the words above the headline of such a page.

  Raises:
    InputError: as `check`, or a file is where the page is written first.
  """
  path = check('out', given, what, is_page(kicker))
  scratch = path.with_suffix('.tmp')  # of files.whole
  if scratch.exists():
    raise InputError(
      f'--out={given}: {scratch} is there, which writing would replace; name'
      ' another file or take it away'
    )
  return path


def check(
  flag: str, given: str | os.PathLike, what: str, is_ours: Callable[[str], bool]
) -> Path:
  """Returns a path that may be written to.

  Args:
    flag: that names it, for messages.
    given: the path.
    what: is written there, in words: 'a comparison'.
    is_ours: whether the text of a file is of that kind.

  Raises:
    InputError: the file can't be written, or is there and is something else.
  """
  path, wrong = Path(given), None
  if not path.parent.is_dir():
    wrong = f'there is no folder {path.parent}; make it first'
  elif path.is_dir():
    wrong = 'is a folder; name a file in it'
  elif not os.access(path if path.exists() else path.parent, os.W_OK):
    wrong = 'may not be written; name another file'
  elif path.exists() and not (path.is_file() and is_ours(_text(path))):
    wrong = f'is there and is not {what}; name another file or take it away'
  if wrong:
    raise InputError(f'--{flag}={given}: {wrong}')
  return path


def _text(path: Path) -> str:
  """Returns the text of a file, bytes that are no UTF-8 replaced."""
  return path.read_bytes().decode('utf-8', 'replace')


def is_page(kicker: str) -> Callable[[str], bool]:
  """Returns what recognises a page by the words above its headline."""
  return lambda text: f'<p class="kicker">{kicker}</p>' in text


def is_json(*names: str) -> Callable[[str], bool]:
  """Returns what recognises a JSON object by names that it has."""
  return lambda text: _has(_parsed(text), names)


def is_json_of(*names: str) -> Callable[[str], bool]:
  """Returns what recognises an object of objects that have some names."""

  def recognised(text: str) -> bool:
    found = _parsed(text)
    some = isinstance(found, dict) and bool(found)
    return some and all(_has(one, names) for one in found.values())

  return recognised


def is_picture(text: str) -> bool:
  """Returns whether a picture says that Matplotlib has drawn it."""
  return 'matplotlib' in text.lower()


def _has(found: Any, names: Sequence[str]) -> bool:
  """Returns whether a value is an object with all of some names."""
  return isinstance(found, dict) and all(name in found for name in names)


def _parsed(text: str) -> Any:
  """Returns the value of JSON text; None if it is none."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None
