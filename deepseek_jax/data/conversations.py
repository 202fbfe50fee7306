"""Reads conversations: who says what, in the three forms that files have.

    {"messages": [{"role": "user", "content": "Hi"}, ...]}     OpenAI
    {"conversations": [{"from": "human", "value": "Hi"}, ...]} ShareGPT
    {"prompt": "Hi", "completion": "Hello"}                    pairs

In .jsonl, one object a line, and in .parquet, one a row. A record that is of
no form is an InputError that names its line: none is left out in silence.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError

KINDS = ('.jsonl', '.parquet')
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
_SHAREGPT = {
  'system': 'system',
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'assistant': 'assistant',
  'observation': 'tool',
  'tool': 'tool',
}
# What trainers mark a turn by that counts in no loss, or that does.
_MARKS = ('weight', 'train', 'loss')
# Of an assistant's turn, beside its text: see infer.formats.message.
_BESIDE = ('reasoning_content', 'reasoning', 'thinking', 'tool_calls')
_LONGEST = 1 << 26  # bytes of a line


class Conversation(NamedTuple):
  """Holds the messages of a record, and where it stands."""

  messages: tuple[dict, ...]  # 'role', 'content' and what else a form allows
  where: str  # file and line
  tools: tuple[dict, ...] = ()  # JSON schemas of what the model may call
  given: int = 0  # assistant's turns of a prompt: read, but not learnt


def read(path: str) -> Iterator[Conversation]:
  """Yields the conversations of a file, or of the files in a folder by name.

  Raises:
    InputError: a file can't be read, or a record is of no known form.
  """
  for file in files_of(path):
    kind = os.path.splitext(file)[1].lower()
    records = json_lines(file) if kind == '.jsonl' else _rows(file)
    for where, record in records:
      yield conversation(record, where)


def files_of(path: str) -> list[str]:
  """Returns the files that `path` names; InputError if it names none."""
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise InputError(f'data.path = {path!r}: does not exist')
  found = [path]
  if os.path.isdir(path):
    found = sorted(os.path.join(path, name) for name in os.listdir(path))
  found = [f for f in found if f.lower().endswith(KINDS)]
  if not found:
    raise InputError(
      f'data.path = {path!r}: holds no {" or ".join(KINDS)} file of'
      ' conversations'
    )
  return found


def json_lines(file: str) -> Iterator[tuple[str, Any]]:
  """Yields (place, value) of the lines of JSON that are not blank.

  Raises:
    InputError: names the file, or the line, that can't be read.
  """
  try:
    with open(file, 'rb') as stream:
      number = 0
      while line := stream.readline(_LONGEST + 1):
        number += 1
        where = f'{file} line {number}'
        if len(line) > _LONGEST:
          raise InputError(f'{where}: has more than {_LONGEST >> 20} MiB')
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
        if line.strip():
          yield where, _json(line, where)
  except OSError as error:
    raise InputError(f'{file}: cannot be read ({error.strerror})') from error


def _json(line: bytes, where: str) -> Any:
  """Returns the value of a line of JSON; InputError if it is none."""
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: is not JSON ({error})') from None


def _rows(file: str) -> Iterator[tuple[str, Any]]:
  """Yields (place, value) of the rows of a parquet file."""
  import pyarrow
  import pyarrow.parquet

  try:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
      for batch in table.iter_batches(batch_size=256):
        for record in batch.to_pylist():
          yield f'{file} row {number}', _without_none(record)
          number += 1
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{file}: is no sound parquet file ({error})') from None


def _without_none(value: Any) -> Any:
  """Returns a row without the fields that its table has and it has not."""
  if isinstance(value, Mapping):
    return {k: _without_none(v) for k, v in value.items() if v is not None}
  return [_without_none(v) for v in value] if isinstance(value, list) else value


def conversation(record: Any, where: str) -> Conversation:
  """Returns the conversation of a record; InputError if it is of no form."""
  if not isinstance(record, Mapping):
    raise InputError(f'{where}: is {type(record).__name__}, must be an object')
  tools, given = _list(record.get('tools') or [], 'tools', where), 0
  if 'messages' in record:
    said = _list(record['messages'], 'messages', where)
    messages = [_openai(m, where) for m in said]
  elif 'conversations' in record:
    said = _list(record['conversations'], 'conversations', where)
    messages = [_sharegpt(m, where) for m in said]
  elif 'prompt' in record and 'completion' in record:
    prompt, completion = _pair(record, where)
    messages, given = prompt + completion, _answers(prompt)
  else:
    raise InputError(
      f"{where}: has {sorted(map(str, record))}; write 'messages',"
      " 'conversations', or 'prompt' and 'completion'"
    )
  if record.get('system'):
    messages.insert(0, {'role': 'system', 'content': record['system']})
  if _answers(messages) == given:
    raise InputError(f'{where}: has no assistant message to learn from')
  _check(messages, where)
  messages = [_unmarked(message, where) for message in messages]
  return Conversation(tuple(messages), where, tuple(tools), given)


def _answers(messages: list[dict]) -> int:
  """Returns how many messages are an assistant's."""
  return sum(message.get('role') == 'assistant' for message in messages)


def _unmarked(message: dict, where: str) -> dict:
  """Returns a message without marks that say what happens anyway.

  Raises:
    InputError: an assistant's turn is marked as one that is not learnt.
  """
  for name in _MARKS:
    if message['role'] == 'assistant' and message.get(name, 1) not in (1, None):
      raise InputError(
        f'{where}: {name} = {message[name]!r}: every turn of an assistant is'
        " learnt; write what is not as messages of a 'prompt', and what is as"
        " those of its 'completion'"
      )
  return {name: v for name, v in message.items() if name not in _MARKS}


def _list(value: Any, name: str, where: str) -> list:
  """Returns a list of objects, which may be written as JSON text."""
  if isinstance(value, str):
    value = _json(value.encode(), f'{where}: {name}')
  if not isinstance(value, list) or not all(
    isinstance(v, Mapping) for v in value
  ):
    raise InputError(f'{where}: {name} must be a list of objects')
  return value


def _openai(message: Mapping, where: str) -> dict:
  """Returns a message; content in parts of text becomes one text."""
  content = message.get('content')
  if isinstance(content, list):
    texts = [p.get('text') if isinstance(p, Mapping) else None for p in content]
    if not all(isinstance(text, str) for text in texts):
      raise InputError(f'{where}: content has a part that is no text')
    content = ''.join(texts)
  return {**message, 'content': content}


def _sharegpt(message: Mapping, where: str) -> dict:
  """Returns a message of ShareGPT's form, its role by OpenAI's name."""
  role = _SHAREGPT.get(str(message.get('from')).lower())
  if role is None:
    raise InputError(
      f"{where}: 'from' = {message.get('from')!r}: must be one of"
      f' {sorted(_SHAREGPT)}'
    )
  beside = {n: message[n] for n in (*_MARKS, *_BESIDE) if n in message}
  return {'role': role, 'content': message.get('value'), **beside}


def _pair(record: Mapping, where: str) -> tuple[list[dict], list[dict]]:
  """Returns the messages of a prompt, and of its completion.

  Each may be text, or messages as TRL writes them.
  """
  out = [], []
  for part, (name, role) in zip(
    out, (('prompt', 'user'), ('completion', 'assistant'))
  ):
    value = record[name]
    if isinstance(value, str):
      part.append({'role': role, 'content': value})
    else:
      part += [_openai(m, where) for m in _list(value, name, where)]
  return out


def _check(messages: list[dict], where: str) -> None:
  """Raises InputError for messages that nobody could have said."""
  for message in messages:
    role, content = message.get('role'), message.get('content')
    if role not in ROLES:
      raise InputError(f'{where}: role = {role!r}: must be one of {ROLES}')
    silent = content is None and message.get('tool_calls')
    if not isinstance(content, str) and not silent:
      raise InputError(
        f'{where}: content of {role} is {type(content).__name__}, must be text'
      )
    try:
      (content or '').encode()
    except UnicodeEncodeError as error:  # half a surrogate pair
      raise InputError(
        f'{where}: content of {role} is no valid Unicode (character'
        f' {error.start})'
      ) from None
