"""Reads the messages and tools of a conversation, each field checked."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.infer.formats import message
from deepseek_jax.serve import refusals
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.json_fields import Fields, parse_body, shown
from deepseek_jax.serve.response_format import check_schema

_NAME = re.compile(r'[A-Za-z0-9_.:-]{1,128}')
_PLACE = re.compile(r'messages[\w.\[\]]*')


def read(fields: Fields, limits: Limits) -> tuple[Mapping[str, Any], ...]:
  """Returns the messages of a request; ApiError names one that is wrong."""
  found = fields.items('messages', limits.messages)
  if not found:
    fields.fail('messages', 'is empty; give at least one message')
  try:
    said = message.read(found)
  except InputError as error:
    raise at_message(error) from None
  last = len(said) - 1
  if said[last].role == 'assistant' and not said[last].prefix:
    fields.fail(
      f'messages[{last}]',
      'the last message is an answer: write a user message behind it, or give'
      ' it "prefix": true to have it gone on with',
    )
  for i, one in enumerate(said):
    for j, call in enumerate(one.tool_calls):
      _check_arguments(call.arguments, f'messages[{i}].tool_calls[{j}]')
  return tuple(found)


def at_message(error: InputError) -> refusals.ApiError:
  """Returns an error of a conversation, its `param` the message's place."""
  found = _PLACE.match(str(error))
  return refusals.refused(error, found[0] if found else 'messages')


def _check_arguments(text: str, where: str) -> None:
  """Raises ApiError unless a call's arguments are a JSON object."""
  try:
    parse_body(text.encode())
  except refusals.ApiError as error:
    what = error.message.removeprefix('the body ')
    raise refusals.wrong(
      f'{where}.function.arguments', f'{what}; write a JSON object as a string'
    ) from None


def _name(fields: Fields) -> str:
  """Returns the name of a function."""
  name = fields.text('name')
  if name is None or not _NAME.fullmatch(name):
    fields.fail(
      'name', f'is {shown(name)}; write letters, digits, _ and -, at most 128'
    )
  return name


class Tools(NamedTuple):
  """Holds the functions that may be called.

  Attributes:
    functions: as the request has them.
    choice: 'auto', 'required', or 'function': the one named below.
    function: that must be called.
    parallel: whether an answer may have several calls.
  """

  functions: tuple[dict[str, Any], ...] = ()
  choice: str = 'auto'
  function: str | None = None
  parallel: bool = True


def tools(fields: Fields, limits: Limits) -> Tools:
  """Returns the functions that may be called; ApiError names a wrong one."""
  for old, new in (('functions', 'tools'), ('function_call', 'tool_choice')):
    if fields.has(old):
      fields.fail(old, f'is no longer taken; write {new}')
  found = fields.items('tools', limits.tools) or []
  out = [_tool(t, f'tools[{i}]', limits) for i, t in enumerate(found)]
  names = [tool['function']['name'] for tool in out]
  if len(set(names)) < len(names):
    fields.fail('tools', 'two functions have the same name')
  choice, function = _choice(fields)
  parallel = fields.flag('parallel_tool_calls', True)
  if choice in ('required', 'function') and not out:
    fields.fail('tool_choice', f'is {choice}, but there are no tools')
  if choice == 'function' and function not in names:
    fields.fail('tool_choice', f'names {function!r}, which tools has not')
  if choice == 'none':
    out, choice = [], 'auto'
  return Tools(tuple(out), choice, function, parallel)


def _choice(fields: Fields) -> tuple[str, str | None]:
  """Returns tool_choice: (a word, the function that it names)."""
  words = ('auto', 'none', 'required')
  value = fields.raw('tool_choice', 'auto')
  if isinstance(value, str) and value in words:
    return value, None
  if not isinstance(value, dict):
    fields.fail(
      'tool_choice',
      f'is {shown(value)}; write "auto", "none", "required" or'
      ' {"type": "function", "function": {"name": ...}}',
    )
  inner = Fields(value, fields.name('tool_choice'))
  inner.choice('type', 'function', ('function',))
  function = inner.inner('function')
  if function is None:
    inner.fail('function', 'is missing')
  name = _name(function)
  function.close()
  inner.close()
  return 'function', name


def _tool(data: Any, where: str, limits: Limits) -> dict[str, Any]:
  """Returns a function that may be called, as the request has it."""
  fields = Fields(data, where)
  fields.choice('type', 'function', ('function',))
  function = fields.inner('function')
  if function is None:
    fields.fail('function', 'is missing')
  out = {'name': _name(function)}
  description = function.text('description', most=limits.schema)
  if description is not None:
    out['description'] = description
  schema = function.raw('parameters')
  if schema is not None:
    check_schema(schema, function.name('parameters'), limits)
    out['parameters'] = schema
  if function.has('strict'):
    out['strict'] = function.flag('strict')
  function.close()
  fields.close()
  return {'type': 'function', 'function': out}
