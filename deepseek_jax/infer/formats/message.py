"""Reads OpenAI-style messages, tools and options into one checked form.

Nothing is skipped in silence: what no format can render is named.
"""

import decimal
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError

MAX_DEPTH = 32  # of a JSON schema or of arguments
ROLES = ('system', 'user', 'assistant', 'tool', 'latest_reminder')
# Names that templates and APIs use for what an assistant thought.
REASONING = ('reasoning_content', 'thinking', 'reasoning')
_KNOWN = {'role', 'content', 'tool_calls', 'tool_call_id', 'prefix', *REASONING}
# Sent along by clients, and part of no format.
_LABELS = {'name', 'id', 'refusal', 'annotations', 'audio', 'function_call'}
# Of reasoning: OpenAI's words in those of DeepSeek.
EFFORTS = {
  'none': 'none',
  'minimal': 'low',
  'low': 'low',
  'medium': 'high',
  'high': 'high',
  'xhigh': 'high',
  'max': 'max',
}


class ToolCall(NamedTuple):
  """Holds a call that an assistant makes. `arguments` is a JSON object."""

  name: str
  arguments: str
  id: str = ''

  def message(self) -> dict[str, Any]:
    """Returns it as in an OpenAI-style message."""
    function = {'name': self.name, 'arguments': self.arguments}
    return {'id': self.id, 'type': 'function', 'function': function}


class Message(NamedTuple):
  """Holds a turn of a conversation.

  Attributes:
    role: one of ROLES.
    content: its text.
    reasoning: of an assistant, what came before the answer.
    tool_calls: of an assistant.
    answers: of a tool, which call of the assistant's last turn it answers.
    prefix: of the last assistant: it is to be continued.
  """

  role: str
  content: str = ''
  reasoning: str = ''
  tool_calls: tuple[ToolCall, ...] = ()
  answers: int = 0
  prefix: bool = False


class Talk(NamedTuple):
  """Holds all that a format renders.

  Attributes:
    messages: the turns.
    tools: functions that may be called: name, description, parameters.
    thinking: whether the next answer begins with reasoning.
    effort: 'low', 'high' or 'max'; None for the format's own.
    answer: of the answer's form: None, 'json_object' or a JSON schema.
    required: whether the answer must call a tool.
  """

  messages: tuple[Message, ...]
  tools: tuple[Mapping[str, Any], ...] = ()
  thinking: bool = False
  effort: str | None = None
  answer: str | Mapping[str, Any] | None = None
  required: bool = False


def shown(value: Any) -> str:
  """Returns what an error shows of a value: its beginning, in one line."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # such as a number of 10,000 digits
    text = f'<{type(value).__name__}>'
  return text if len(text) < 80 else f'{text[:76]} ...'


def to_json(value: Any) -> str:
  """Returns a value as the formats write JSON: blanks, letters as they are.

  Raises ValueError for what is no JSON.
  """
  return json.dumps(value, ensure_ascii=False, allow_nan=False)


def to_short_json(value: Any) -> str:
  """Returns a value as to_json does, but for Python's 1e-07 and 1e-05.

  These are 1e-7 and 0.00001, as DeepSeek-V4's encoder writes them.
  """
  if isinstance(value, Mapping):
    write = to_short_json
    fields = (f'{to_json(str(k))}: {write(v)}' for k, v in value.items())
    return f'{{{", ".join(fields)}}}'
  if isinstance(value, list | tuple):
    return f'[{", ".join(map(to_short_json, value))}]'
  text = to_json(value)
  if not isinstance(value, float):
    return text
  if text.endswith('e-05'):
    return f'{decimal.Decimal(text):f}'
  return re.sub('e([+-])0', r'e\1', text)


def read(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
  """Returns checked messages; InputError names what is wrong with which."""
  if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence):
    raise InputError(
      'messages: give a list, as [{"role": "user", "content": "Hi"}]'
    )
  if not messages:
    raise InputError('messages: give at least one')
  out: list[Message] = []
  calls: list[ToolCall] = []
  open_calls: set[int] = set()
  for n, message in enumerate(messages):
    where = f'messages[{n}]'
    found = _message(message, where, last=n == len(messages) - 1)
    if found.role == 'tool':
      at = _answered(message.get('tool_call_id'), calls, open_calls, where)
      open_calls.remove(at)
      found = found._replace(answers=at)
    elif open_calls:
      raise InputError(
        f'{where}: follows tool_calls that have no result yet: give a message'
        ' of role tool for each'
      )
    if found.role == 'assistant':
      calls, open_calls = found.tool_calls, set(range(len(found.tool_calls)))
    elif found.role != 'tool':
      calls = []
    out.append(found)
  if open_calls and out[-1].role == 'tool':
    raise InputError(
      f'messages: {len(open_calls)} of the last tool_calls have no result:'
      ' give a message of role tool for each'
    )
  return tuple(out)


def _answered(
  given: Any, calls: Sequence[ToolCall], unanswered: set[int], where: str
) -> int:
  """Returns which call a tool's message answers: by its id, else in order."""
  if not unanswered:
    raise InputError(
      f'{where}: role tool must follow an assistant with tool_calls, one'
      ' message for each'
    )
  if given is None:
    return min(unanswered)
  found = [n for n in sorted(unanswered) if calls[n].id == given]
  if not found:
    raise InputError(
      f'{where}.tool_call_id = {shown(given)}: no such open call'
    )
  return found[0]


def _message(message: Any, where: str, last: bool) -> Message:
  """Returns one message; a tool's is not yet matched to its call."""
  if not isinstance(message, Mapping):
    raise InputError(f'{where}: must be an object with role and content')
  _check_fields(message, where)
  role = message.get('role')
  role = 'system' if role == 'developer' else role  # OpenAI's newer name
  if role not in ROLES:
    raise InputError(
      f'{where}.role = {shown(role)}: must be one of {", ".join(ROLES)}'
    )
  reasoning = [message[k] for k in REASONING if message.get(k) is not None]
  calls = _calls(message.get('tool_calls') or (), where)
  content = message.get('content')
  prefix = message.get('prefix') or False
  if role != 'assistant':
    for name, value in (('reasoning', any(reasoning)), ('tool_calls', calls)):
      if value:
        raise InputError(f'{where}.{name}: belongs to role assistant')
  if content is None and not (calls or (any(reasoning) and prefix)):
    raise InputError(f'{where}.content: missing; give a text')
  if prefix is not False and not (prefix is True and last):
    raise InputError(f'{where}.prefix: true only in the last message')
  if prefix and (role != 'assistant' or calls):
    raise InputError(f'{where}.prefix: belongs to an assistant without calls')
  return Message(
    role,
    _text(content, f'{where}.content'),
    _text(reasoning[0] if reasoning else None, f'{where}.reasoning_content'),
    calls,
    prefix=bool(prefix),
  )


def _check_fields(message: Mapping[str, Any], where: str) -> None:
  """Raises InputError for a field that means something unknown."""
  for field, value in message.items():
    known = field in _KNOWN or field in _LABELS
    if not known and value not in (None, [], {}, ''):
      raise InputError(
        f'{where}.{field}: not understood; known are '
        f'{", ".join(sorted(_KNOWN))}'
      )
  for field in ('audio', 'function_call'):
    if message.get(field):
      raise InputError(f'{where}.{field}: not supported')


def _text(content: Any, where: str) -> str:
  """Returns a text, or the texts of a list of parts behind one another."""
  if content is None:
    return ''
  if isinstance(content, Sequence) and not isinstance(content, str | bytes):
    parts = []
    for n, part in enumerate(content):
      kind = part.get('type') if isinstance(part, Mapping) else part
      if kind not in ('text', 'input_text', 'output_text'):
        raise InputError(
          f'{where}[{n}].type = {shown(kind)}: only text is understood'
        )
      text = part.get('text')
      if not isinstance(text, str):
        raise InputError(f'{where}[{n}].text = {shown(text)}: must be a text')
      parts.append(_text(text, f'{where}[{n}].text'))
    return '\n\n'.join(parts)
  if not isinstance(content, str):
    raise InputError(f'{where} = {shown(content)}: must be a text')
  try:
    content.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f'{where}: character {error.start} is half of a surrogate pair'
    ) from None
  return content


def _calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
  """Returns the calls of a message; arguments may be an object already."""
  out = []
  if not isinstance(calls, Sequence) or isinstance(calls, str):
    raise InputError(f'{where}.tool_calls: must be a list')
  for n, call in enumerate(calls):
    here = f'{where}.tool_calls[{n}]'
    function = call.get('function', call) if isinstance(call, Mapping) else None
    name = function.get('name') if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
      raise InputError(f'{here}.function.name: give the name of a function')
    arguments = function.get('arguments', '{}')
    if isinstance(arguments, Mapping):
      check_json(arguments, f'{here}.function.arguments')
      arguments = to_json(arguments)
    if not isinstance(arguments, str):
      raise InputError(f'{here}.function.arguments: must be JSON as a text')
    arguments = _text(arguments, f'{here}.function.arguments')
    out.append(ToolCall(_text(name, here), arguments, call.get('id') or ''))
  return tuple(out)


def read_tools(
  tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[Mapping[str, Any], ...]:
  """Returns the functions of OpenAI-style tools."""
  out = []
  if isinstance(tools, Mapping | str) or not isinstance(tools, Sequence | None):
    raise InputError('tools: give a list')
  for n, tool in enumerate(tools or ()):
    function = tool.get('function', tool) if isinstance(tool, Mapping) else None
    name = function.get('name') if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
      raise InputError(f'tools[{n}].function.name: give a name')
    if tool.get('type', 'function') != 'function':
      raise InputError(
        f'tools[{n}].type = {shown(tool["type"])}: must be function'
      )
    parameters = function.get('parameters')
    if parameters is not None and not isinstance(parameters, Mapping):
      raise InputError(f'tools[{n}].function.parameters: must be a JSON schema')
    check_json(function, f'tools[{n}].function')
    out.append(function)
  return tuple(out)


def check_json(value: Any, where: str) -> None:
  """Raises InputError for what is no JSON in UTF-8, or nested too deeply."""
  level, depth = [value], 0
  while level:
    depth += 1
    if depth > MAX_DEPTH:
      raise InputError(f'{where}: is deeper than {MAX_DEPTH} levels')
    level = [part for each in level for part in _parts(each)]
  try:
    to_short_json(value).encode()
  except (TypeError, ValueError) as error:
    raise InputError(f'{where}: is no JSON: {error}') from None


def _parts(value: Any) -> Collection[Any]:
  """Returns what an array or object holds; nothing of anything else."""
  if isinstance(value, Mapping):
    return value.values()
  return value if isinstance(value, list | tuple) else ()


def read_answer(form: Any) -> str | Mapping[str, Any] | None:
  """Returns the form that response_format asks for: see Talk.answer."""
  kind = form.get('type') if isinstance(form, Mapping) else form
  kind = kind if isinstance(kind, str | None) else shown(kind)
  if kind in (None, 'text'):
    return None
  if kind == 'json_object':
    return kind
  schema = form.get('json_schema') if kind == 'json_schema' else None
  schema = schema.get('schema') if isinstance(schema, Mapping) else None
  if not isinstance(schema, Mapping):
    raise InputError(
      f'response_format.type = {shown(kind)}: must be text, json_object, or'
      ' json_schema with json_schema.schema'
    )
  check_json(schema, 'response_format.json_schema.schema')
  return schema
