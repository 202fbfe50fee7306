"""Reads what form an answer must have: JSON, a schema, a regular expression."""

import json
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.serve import refusals
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.json_fields import Fields
from deepseek_jax.serve.requests import nesting
from deepseek_jax.serve.served import Served

_KINDS = ('text', 'json_object', 'json_schema', 'regex')
_FIELD = 'response_format'


class AnswerForm(NamedTuple):
  """Holds what form an answer must have: a kind, and a schema or regex."""

  kind: str
  value: Any = None

  def grammar(self, served: Served, after: int | None = None) -> Any:
    """Returns the engine's grammar; ApiError if it is wrong.

    Args:
      served: makes it.
      after: a token behind which the answer begins; None: at once.
    """
    try:
      return served.grammar(self.kind, self.value, after)
    except InputError as error:
      raise refusals.wrong(_FIELD, str(error)) from None


def read(fields: Fields, served: Served, limits: Limits) -> AnswerForm | None:
  """Returns what `response_format` asks for; None for free text.

  Beside OpenAI's kinds: {"type": "regex", "regex": "..."}.

  Raises:
    ApiError: it is wrong, too large, or this server constrains no answers.
  """
  inner = fields.inner(_FIELD)
  if inner is None:
    return None
  kind = inner.choice('type', None, _KINDS)
  if kind is None:
    inner.fail('type', 'is missing')
  value = None
  if kind == 'json_schema':
    value = _schema(inner, limits)
  elif kind == 'regex':
    value = inner.text('regex', most=limits.schema)
    if value is None:
      inner.fail('regex', 'is missing')
  inner.close()
  if kind == 'text':
    return None
  if served.grammar is None:
    raise refusals.wrong(
      _FIELD,
      f'is {kind}, but this server constrains no answers: it needs the extra'
      " 'grammar' (llguidance)",
    )
  return AnswerForm(kind, value)


def _schema(inner: Fields, limits: Limits) -> Any:
  """Returns the JSON schema of {"json_schema": {"name", "schema"}}."""
  about = inner.inner('json_schema')
  if about is None:
    inner.fail('json_schema', 'is missing')
  about.text('name', most=64)
  about.text('description', most=limits.schema)
  about.flag('strict')
  schema = about.raw('schema')
  about.close()
  check_schema(schema, f'{_FIELD}.json_schema.schema', limits)
  return schema


def check_schema(schema: Any, where: str, limits: Limits) -> None:
  """Raises ApiError for a schema that is none, too large or too deep."""
  if not isinstance(schema, dict | bool):
    raise refusals.wrong(where, 'must be a JSON schema, an object')
  if nesting(schema, limits.schema_depth) > limits.schema_depth:
    raise refusals.wrong(
      where, f'is nested more than {limits.schema_depth} levels deep'
    )
  size = len(json.dumps(schema))
  if size > limits.schema:
    raise refusals.wrong(
      where, f'has {size} characters; at most {limits.schema} are taken'
    )
  for name, value in _references(schema):
    if not value.startswith('#'):
      raise refusals.wrong(
        where, f'{name} = {value[:60]!r}: only what is inside (#/...) is read'
      )


def _references(schema: Any) -> list[tuple[str, str]]:
  """Returns (keyword, target) of what a schema refers to."""
  out, left = [], [schema]
  while left:
    node = left.pop()
    if isinstance(node, dict):
      out += [
        (name, node[name])
        for name in ('$ref', '$dynamicRef')
        if isinstance(node.get(name), str)
      ]
      left += node.values()
    elif isinstance(node, list):
      left += node
  return out
