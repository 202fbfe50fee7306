"""Renders and holds conversations by the template of a published folder.

A template is a program that came with a download. In jinja2's immutable
sandbox it reaches no file, no import and no attribute of Python's; a process of
its own bounds its time and memory (`deepseek_jax.infer.template`).
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax import files
from deepseek_jax.data import special_tokens
from deepseek_jax.errors import InputError
from deepseek_jax.infer import template
from deepseek_jax.infer.detokenize import Stops
from deepseek_jax.infer.dialect import AnswerParser, Chat, Delta, Dialect
from deepseek_jax.infer.formats.message import REASONING

MAX_TEMPLATE = 1 << 20  # characters of a template

Message = Mapping[str, Any]  # 'role': system, user or assistant; 'content'
# (prompt ids) -> new token ids, one at a time; ends by itself.
GenerateStream = Callable[[list[int]], Iterable[int]]


def template_config(folder: str) -> dict[str, Any]:
  """Returns the tokenizer_config.json of a folder with its chat_template.

  A chat_template.jinja beside it takes precedence, and names of tokens may come
  from special_tokens_map.json, as in transformers. Raises InputError if the
  folder has no template.
  """
  folder = os.path.expanduser(folder)
  config = files.load_json(
    os.path.join(folder, 'tokenizer_config.json'), 10 << 20
  )
  for key, text in special_tokens.declared(folder).names.items():
    if special_tokens.name(config.get(key)) != text:
      config[key] = text
  beside = os.path.join(folder, 'chat_template.jinja')
  if os.path.isfile(beside):
    try:
      with open(beside, encoding='utf-8') as file:
        config['chat_template'] = file.read(MAX_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f'{beside}: cannot be read: {error}') from None
  _template(config)
  return config


def _template(
  config: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
  """Returns the chat template; InputError if there is none, or too long a one.

  If it has several by name, 'tool_use' is used with tools, else 'default'.
  """
  found = config.get('chat_template')
  if isinstance(found, list):  # several, by name
    found = {
      t.get('name'): t.get('template') for t in found if isinstance(t, dict)
    }
  if isinstance(found, dict):
    named = 'tool_use' if tools is not None else 'default'
    found = found.get(named, found.get('default'))
  if not isinstance(found, str):
    raise InputError(
      'tokenizer_config.json: chat_template: missing; this model has no chat'
      ' format, sample from it without --chat'
    )
  if len(found) > MAX_TEMPLATE:
    raise InputError(
      f'chat_template: longer than {MAX_TEMPLATE} characters: refused'
    )
  return found


def render(
  config: Mapping[str, Any],
  messages: Sequence[Message],
  *,
  tools: Sequence[Mapping[str, Any]] | None = None,
  documents: Sequence[Mapping[str, Any]] | None = None,
  add_generation_prompt: bool = True,
  **variables: Any,
) -> str:
  """Returns messages as the text that the model was trained on.

  Equals the text of transformers' apply_chat_template.

  Args:
    config: contents of tokenizer_config.json (see `template_config`).
    messages: [{'role': 'user', 'content': 'Hi'}, ...]; a field that is None
      counts as missing.
    tools: JSON schemas of what the model may call.
    documents: [{'title': ..., 'text': ...}, ...] to answer from.
    add_generation_prompt: end with what opens the assistant's answer.
    **variables: more that the template knows, such as thinking=True.

  Raises:
    InputError: the template is missing, wrong, forbidden, refuses, or takes
      too long or too much memory.
  """
  known = {
    key: name
    for key, value in config.items()
    if key.endswith('_token')
    and isinstance(name := special_tokens.name(value), str)
  }
  return template.render(
    _template(config, tools),
    {
      **known,
      'messages': [_message(m) for m in messages],
      'tools': tools,
      'documents': documents,
      'add_generation_prompt': add_generation_prompt,
      **variables,
    },
  )


def _message(message: Message) -> dict[str, Any]:
  """Returns a message without what is None, its reasoning by every name."""
  out = {key: value for key, value in message.items() if value is not None}
  found = [out[key] for key in REASONING if key in out]
  if found:
    out = {'thinking': found[0], **out, 'reasoning_content': found[0]}
  return out


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
  """Yields pieces of a text up to the first of `stops`.

  Text that may begin a stop waits for the next piece. InputError if one of
  `stops` is empty.
  """
  found = Stops(stops)
  for piece in pieces:
    yield found.feed(piece)
    if found.stopped:
      return
  yield found.finish()


HELP = """/help           this list
/system TEXT    says what the assistant is to be; begins anew
/reset          begins anew
/save FILE      writes the conversation as JSON
/quit           ends, as the end of the input does"""


def converse(
  generate_stream: GenerateStream,
  dialect: Dialect,
  *,
  ends: Sequence[int],
  system: str | None = None,
  context: int | None = None,
  ask: Callable[[], str] = lambda: input('> '),
  show: Callable[[str], None] = lambda text: print(text, end='', flush=True),
  note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, str]]:
  """Holds a conversation until the input ends; returns its messages.

  A line that begins with / is a command, see HELP.

  Args:
    generate_stream: token ids of the prompt -> new token ids as they are made.
    dialect: how the model's conversations are written; what a user says never
      becomes a special token.
    ends: tokens that end an answer and aren't shown (see
      `deepseek_jax.data.boundaries`).
    system: a first system message.
    context: tokens that prompt and answer may have, for the note.
    ask: gives the next user message; EOFError ends.
    show: writes a piece of the answer.
    note: takes a line about an answer, a command, or what went wrong.
  """
  messages = _begun(system)
  while True:
    try:
      said = ask()
    except (EOFError, KeyboardInterrupt):
      break
    word, _, rest = said.strip().partition(' ')
    if word == '/quit':
      break
    if word.startswith('/'):
      messages = _obeyed(word, rest.strip(), messages, note)
      continue
    asked = [*messages, {'role': 'user', 'content': said}]
    try:
      # The whole conversation is written again: formats look at all of it.
      talk = Chat(tuple(asked))
      prompt = dialect.encode(talk)
      counted, begun = _Counted(generate_stream(prompt)), time.monotonic()
      parser = dialect.parser(talk, prompt, ())
      answer = _answered(parser, _until(counted, ends), show)
    except InputError as error:
      note(f'{error}; /reset begins anew')
      continue
    seconds = time.monotonic() - begun
    note(_about(counted.count, seconds, len(prompt), context))
    messages = [*asked, answer]
  return messages


class _Counted:
  """Counts tokens as they pass."""

  def __init__(self, ids: Iterable[int]):
    """Takes the tokens."""
    self._ids, self.count = ids, 0

  def __iter__(self) -> Iterator[int]:
    """Yields the tokens."""
    for token in self._ids:
      self.count += 1
      yield token


def _answered(
  parser: AnswerParser, ids: Iterable[int], show: Callable[[str], None]
) -> dict[str, str]:
  """Shows an answer as it is made; returns it as a message.

  Reasoning ends with a line of its own. An interrupt (Ctrl-C) ends the answer
  alone.
  """
  thought, said = [], []

  def take(delta: Delta) -> None:
    if delta.content and thought and not said:
      show('\n\n')
    thought.extend([delta.reasoning] if delta.reasoning else [])
    said.extend([delta.content] if delta.content else [])
    if text := delta.reasoning + delta.content:
      show(text)

  try:
    for token in ids:
      take(parser.feed(token))
  except KeyboardInterrupt:
    pass
  take(parser.finish())
  show('\n')
  message = {'role': 'assistant', 'content': ''.join(said)}
  if thought:
    message['reasoning_content'] = ''.join(thought)
  return message


def _begun(system: str | None) -> list[dict[str, str]]:
  """Returns the messages of a conversation that begins."""
  return [{'role': 'system', 'content': system}] if system else []


def _obeyed(
  word: str,
  rest: str,
  messages: list[dict[str, str]],
  note: Callable[[str], None],
) -> list[dict[str, str]]:
  """Does what a command says; returns the messages after it."""
  first = (
    messages[0]['content']
    if messages[:1] and (messages[0]['role'] == 'system')
    else None
  )
  if word == '/reset':
    note('begun anew')
    return _begun(first)
  if word == '/system':
    note('begun anew' if rest else 'begun anew, without a system message')
    return _begun(rest)
  if word == '/save':
    note(_saved(rest, messages))
  elif word == '/help':
    note(HELP)
  else:
    note(f'{word}: no such command\n{HELP}')
  return messages


def _saved(path: str, messages: list[dict[str, str]]) -> str:
  """Writes messages to a new file; returns a line about it."""
  if not path:
    return '/save: name a file, as in /save talk.json'
  text = json.dumps(messages, ensure_ascii=False, indent=1) + '\n'
  try:
    with open(os.path.expanduser(path), 'x', encoding='utf-8') as file:
      file.write(text)
  except FileExistsError:
    return f'{path}: is there already; nothing was written, name another'
  except OSError as error:
    return f'{path}: cannot be written: {error.strerror}'
  return f'{len(messages)} messages are in {path}'


def _about(count: int, seconds: float, prompt: int, context: int | None) -> str:
  """Returns a line about an answer's speed and what is left of the context."""
  line = f'{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s'
  if context is None:
    return line
  return f'{line}, {max(0, context - prompt - count)} of {context} left'


def _until(ids: Iterable[int], ends: Sequence[int]) -> Iterator[int]:
  """Yields tokens up to the first that ends an answer."""
  for token in ids:
    if token in ends:
      return
    yield int(token)
