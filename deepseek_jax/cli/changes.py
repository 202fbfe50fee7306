"""Reads --change=FIELD=VALUE, a change of a recipe."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import InputError


def parsed(given: Sequence[str], own: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {field: value} of texts field=value; values as Python reads them.

  Args:
    given: the texts.
    own: fields that have flags of their own, and these flags' values.

  Raises:
    InputError: a text has no field or no value, or a field comes twice.
  """
  out: dict[str, Any] = {}
  for text in given:
    field, equals, value = map(str.strip, text.partition('='))
    if not field or not equals or not value:
      raise InputError(f'--change={text}: write field=value')
    if field in out:
      raise InputError(f'--change={text}: {field} is given twice')
    if field in own:
      flag = field.rpartition('.')[2]
      raise InputError(
        f'--change={text}: has a flag of its own; give --{flag}='
      )
    try:
      out[field] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      out[field] = value
  return {**out, **own}
