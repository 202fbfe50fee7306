"""Chat: the template of tokenizer_config.json, sandboxed, and a conversation.

A template is a program that came with a download. In jinja2's immutable
sandbox it reaches no file, no import and no attribute of Python's; it could
still waste time and memory, as any template can.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax import files
from deepseek_jax.errors import InputError

MAX_TEMPLATE = 1 << 20  # characters of a template

Message = Mapping[str, Any]  # 'role': system, user or assistant; 'content'
# (prompt ids) -> new token ids, one at a time; ends by itself.
GenerateStream = Callable[[list[int]], Iterable[int]]


def template_config(folder: str) -> dict[str, Any]:
  """The tokenizer_config.json of a folder, its chat_template filled in.

  A chat_template.jinja beside it takes precedence, as in transformers. Raises
  InputError if the folder has no template.
  """
  folder = os.path.expanduser(folder)
  config = files.load_json(
    os.path.join(folder, 'tokenizer_config.json'), 10 << 20
  )
  beside = os.path.join(folder, 'chat_template.jinja')
  if os.path.isfile(beside):
    with open(beside, encoding='utf-8') as file:
      config['chat_template'] = file.read(MAX_TEMPLATE + 1)
  _template(config)
  return config


def _template(config) -> str:
  found = config.get('chat_template')
  if isinstance(found, list):  # several, by name
    named = {t.get('name'): t.get('template') for t in found}
    found = named.get('default')
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


def _environment():
  import jinja2
  from jinja2 import sandbox

  def refuse(message):
    raise InputError(f'chat_template: {message}')

  def to_json(value, ensure_ascii=False, indent=None):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
    undefined=jinja2.Undefined,
  )
  environment.filters['tojson'] = to_json
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment


def render(
  config: Mapping[str, Any],
  messages: Sequence[Message],
  *,
  add_generation_prompt: bool = True,
  **variables,
) -> str:
  """Messages as the text that the model was trained on.

  Args:
    config: contents of tokenizer_config.json (see `template_config`).
    messages: [{'role': 'user', 'content': 'Hi'}, ...].
    add_generation_prompt: end with what opens the assistant's answer.
    **variables: more that the template knows, such as thinking=True.

  Raises:
    InputError: the template is missing, wrong, forbidden or refuses.
  """
  known = {
    key: _token_name(value)
    for key, value in config.items()
    if key.endswith('_token') and value is not None
  }
  try:
    template = _environment().from_string(_template(config))
    return template.render(
      **known,
      messages=[dict(m) for m in messages],
      add_generation_prompt=add_generation_prompt,
      **variables,
    )
  except InputError:
    raise
  except Exception as error:  # a foreign program may fail in any way
    raise InputError(f'chat_template: {error}') from None


def _token_name(token):
  return token.get('content') if isinstance(token, dict) else token


def decode_stream(tokenizer, ids: Iterable[int]) -> Iterator[str]:
  """Text of tokens as they come; a character split over tokens waits."""
  held: list[int] = []
  for token in ids:
    held.append(token)
    text = tokenizer.decode(held)
    # No character takes more than 4 bytes; what is still no text then is none.
    if text.endswith('\ufffd') and len(held) < 4:
      continue
    yield text
    held = []
  if held:
    yield tokenizer.decode(held)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
  """Pieces of a text up to the first of `stops`; each is not empty.

  What may be the beginning of one waits.
  """
  held = ''
  for piece in pieces:
    held += piece
    found = [at for at in map(held.find, stops) if at >= 0]
    if found:
      yield held[: min(found)]
      return
    waits = max((_overlap(held, stop) for stop in stops), default=0)
    ready, held = held[: len(held) - waits], held[len(held) - waits :]
    yield ready
  yield held


def _overlap(text: str, stop: str) -> int:
  """How many characters at the end of `text` begin `stop`."""
  sizes = range(min(len(text), len(stop) - 1), 0, -1)
  return next((n for n in sizes if text.endswith(stop[:n])), 0)


def converse(
  generate_stream: GenerateStream,
  tokenizer,
  config: Mapping[str, Any],
  *,
  system: str | None = None,
  ask: Callable[[], str] = lambda: input('> '),
  show: Callable[[str], None] = lambda text: print(text, end='', flush=True),
  **variables,
) -> list[dict[str, str]]:
  """Holds a conversation until the input ends; returns its messages.

  Args:
    generate_stream: token ids of the prompt -> new token ids as they are made;
      tokens of the end of the text end the answer and aren't shown.
    tokenizer: with encode(text, special=True), decode and eos_id.
    config: see `render`, which also gets **variables.
    system: a first system message.
    ask: gives the next user message; EOFError or '/quit' ends.
    show: writes a piece of the answer.
  """
  messages = [{'role': 'system', 'content': system}] if system else []
  while True:
    try:
      said = ask()
    except (EOFError, KeyboardInterrupt):
      break
    if said.strip() == '/quit':
      break
    messages.append({'role': 'user', 'content': said})
    prompt = tokenizer.encode(
      render(config, messages, **variables), special=True
    )
    answer = []
    for text in decode_stream(
      tokenizer, _until(generate_stream(prompt), tokenizer)
    ):
      answer.append(text)
      show(text)
    show('\n')
    messages.append({'role': 'assistant', 'content': ''.join(answer)})
  return messages


def _until(ids, tokenizer):
  for token in ids:
    if token == tokenizer.eos_id:
      return
    yield int(token)
