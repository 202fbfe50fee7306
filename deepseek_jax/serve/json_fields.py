"""Reads the fields of a JSON object, each checked, none skipped in silence.

A field that is null counts as absent, as in OpenAI's API.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from deepseek_jax.serve.refusals import ApiError, wrong

_SHOWN = 60  # characters of a value in a message


def parse_body(data: bytes) -> dict[str, Any]:
  """Returns the JSON object that a request carries.

  Raises:
    ApiError: it is no JSON object, holds NaN, a key twice, or half of a
      surrogate pair (which no text has), or is nested too deeply.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
      raise ValueError('a key occurs twice in an object')
    return out

  def constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no JSON number')

  try:
    text = data.decode()
    out = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    if '\\u' in text:
      json.dumps(out, ensure_ascii=False).encode()
  except RecursionError:
    raise ApiError(400, 'the body is nested too deeply') from None
  except UnicodeError as error:
    raise ApiError(
      400, f'the body holds text that is not Unicode: {error.reason}'
    ) from None
  except ValueError as error:
    raise ApiError(400, f'the body is not valid JSON: {error}') from None
  if not isinstance(out, dict):
    raise ApiError(400, 'the body must be a JSON object')
  return out


def shown(value: Any) -> str:
  """Returns the start of a value as JSON, for a message."""
  try:
    text = json.dumps(value)
  except (TypeError, ValueError, RecursionError):
    text = repr(value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'


class Fields:
  """Takes the fields out of one JSON object; `close` names what is left."""

  def __init__(self, data: Any, where: str = ''):
    """Takes an object; ApiError if it is none.

    Args:
      data: as parsed.
      where: its place in the request, such as 'messages[3]'.
    """
    if not isinstance(data, Mapping):
      raise wrong(where or 'body', f'is {shown(data)}, must be an object')
    self._left = {k: v for k, v in data.items() if v is not None}
    self._known, self._where = set(), where

  def name(self, field: str) -> str:
    """Returns a field's name from the top of the request."""
    return f'{self._where}.{field}' if self._where else field

  def names(self) -> list[str]:
    """Returns the names of the fields that nobody has taken."""
    return list(self._left)

  def has(self, field: str) -> bool:
    """Returns whether a field is there and not null."""
    return field in self._left

  def fail(self, field: str, message: str) -> NoReturn:
    """Raises ApiError about a field."""
    raise wrong(self.name(field), message)

  def raw(self, field: str, default: Any = None) -> Any:
    """Returns a field as it is."""
    self._known.add(field)
    return self._left.pop(field, default)

  def text(
    self, field: str, default: str | None = None, *, most: int | None = None
  ) -> Any:
    """Returns a text of at most `most` characters."""
    value = self.raw(field, default)
    if value is not None and not isinstance(value, str):
      self.fail(field, f'is {shown(value)}, must be a string')
    if value is not None and most is not None and len(value) > most:
      self.fail(field, f'has {len(value)} characters; at most {most} are taken')
    return value

  def flag(self, field: str, default: bool = False) -> bool:
    """Returns true or false."""
    value = self.raw(field, default)
    if not isinstance(value, bool):
      self.fail(field, f'is {shown(value)}, must be true or false')
    return value

  def integer(
    self, field: str, default: int | None, low: int, high: int
  ) -> Any:
    """Returns a whole number from low to high."""
    value = self.raw(field, default)
    if value is None:
      return None
    if type(value) is not int:
      self.fail(field, f'is {shown(value)}, must be a whole number')
    if not low <= value <= high:
      self.fail(field, f'is {value}, must be from {low} to {high}')
    return value

  def number(
    self, field: str, default: float | None, low: float, high: float
  ) -> Any:
    """Returns a number from low to high."""
    value = self.raw(field, default)
    if value is None:
      return None
    if type(value) not in (int, float) or value != value:
      self.fail(field, f'is {shown(value)}, must be a number')
    if not low <= value <= high:
      self.fail(field, f'is {shown(value)}, must be from {low:g} to {high:g}')
    return float(value)

  def choice(
    self, field: str, default: str | None, options: Sequence[str]
  ) -> Any:
    """Returns one of some words."""
    value = self.raw(field, default)
    if value is not None and value not in options:
      self.fail(field, f'is {shown(value)}; this server takes {_or(options)}')
    return value

  def items(self, field: str, most: int) -> list | None:
    """Returns a list of at most `most` items."""
    value = self.raw(field)
    if value is not None and not isinstance(value, list):
      self.fail(field, f'is {shown(value)}, must be a list')
    if value is not None and len(value) > most:
      self.fail(field, f'has {len(value)} items; at most {most} are taken')
    return value

  def inner(self, field: str) -> 'Fields | None':
    """Returns the fields of an object inside this one."""
    value = self.raw(field)
    return None if value is None else Fields(value, self.name(field))

  def without_effect(self, names: Sequence[str]) -> None:
    """Lets fields pass that change no answer of this server."""
    for name in names:
      self.raw(name)

  def close(self) -> None:
    """Raises ApiError on the first field that nobody took."""
    for field in self._left:
      near = difflib.get_close_matches(field, sorted(self._known), n=1)
      hint = f'; did you mean {near[0]}?' if near else '; leave it out'
      self.fail(field[:_SHOWN], f'is not a field that this server knows{hint}')


def _or(options: Sequence[str]) -> str:
  """Returns words as a choice."""
  return ' or '.join(json.dumps(option) for option in options)
