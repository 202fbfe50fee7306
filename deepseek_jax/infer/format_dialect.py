"""Speaks DeepSeek's chat formats, and the templates of other folders."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data import special_tokens
from deepseek_jax.data.tokenizer import SPECIAL, ByteTokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer import chat as templates
from deepseek_jax.infer import formats
from deepseek_jax.infer.dialect import Chat
from deepseek_jax.infer.formats import message, parse, pieces

_THINKING = (pieces.THINK, pieces.END_THINK)
_READ = (*_THINKING, pieces.EOS)


class FormatDialect:
  """Speaks one of DeepSeek's formats; see `Dialect`."""

  def __init__(
    self,
    chosen: formats.Format,
    tokenizer: Any,
    thinking: bool | None = None,
  ):
    """Takes a format and the tokenizer, which must have its marks.

    Args:
      chosen: the format.
      tokenizer: of the model.
      thinking: whether it thinks where a chat does not say; None: as the format
        does by itself.

    Raises:
      InputError: it lacks some.
    """
    self._format, self._tokenizer = chosen, tokenizer
    self._thinking = thinking
    self.name, self.calls = chosen.name, chosen.tools
    self.end_of_thinking = _end_of_thinking(tokenizer)
    self.encode(Chat(({'role': 'user', 'content': ''},)))

  def encode(self, chat: Chat) -> list[int]:
    """Returns the prompt's tokens; InputError if it cannot be written."""
    tools, choice, thinking = chat.tools, chat.tool_choice, chat.thinking
    if choice == 'function':
      tools = [t for t in tools if t['function']['name'] == chat.function]
    if choice in ('required', 'function'):
      choice = 'required'
      thinking = bool(thinking)  # a call is opened in the prompt
    elif thinking is None and chat.effort is None:
      thinking = self._thinking
    rendered = self._format.render(
      chat.messages,
      tools=tools or None,
      tool_choice=choice,
      thinking=thinking,
      effort=chat.effort,
      response_format=chat.form if self._format.answers else None,
    )
    return formats.encode(self._tokenizer, rendered)

  def parser(
    self, chat: Chat, prompt: Sequence[int], stops: Sequence[str]
  ) -> parse.Parser:
    """Returns what reads the answer to a prompt, up to a stop text."""
    return self._format.parser(
      self._tokenizer, prompt, tools=bool(chat.tools), stop=stops
    )


class TemplateDialect:
  """Speaks as the chat template of a folder says; see `Dialect`."""

  name, calls = 'template', False

  def __init__(self, folder: str, tokenizer: Any):
    """Takes the template of a folder; InputError if it has none."""
    self._config = templates.template_config(folder)
    self._tokenizer = tokenizer
    self.end_of_thinking = _end_of_thinking(tokenizer)
    self._names = _special(folder, tokenizer)

  def encode(self, chat: Chat) -> list[int]:
    """Returns the prompt's tokens; a user's text never becomes a special one.

    Names of special tokens in a message pass the template under others, which
    nobody can guess, and are then encoded as the text that they are.
    """
    if chat.effort is not None:
      raise InputError('reasoning_effort: this chat template has none')
    mark = secrets.token_hex(8)
    hidden = {n: f'{mark}{i:04d}' for i, n in enumerate(self._names)}
    variables = {}
    if chat.thinking is not None:
      variables = dict.fromkeys(('thinking', 'enable_thinking'), chat.thinking)
    messages = [_without(m, hidden) for m in _plain(chat.messages)]
    text = templates.render(self._config, messages, **variables)
    parts = re.split(f'{mark}([0-9]{{4}})', text)  # numbers at the odd places
    if mark in ''.join(parts[::2]).lower():
      raise InputError(
        'messages: this chat template changes what is said, and what is said'
        ' spells special tokens: leave them out'
      )
    ids = []
    for i, part in enumerate(parts):
      if i % 2:
        ids += self._tokenizer.encode(self._names[int(part)])
      else:
        ids += self._tokenizer.encode(part, special=True)
    return ids

  def parser(
    self, chat: Chat, prompt: Sequence[int], stops: Sequence[str]
  ) -> parse.Parser:
    """Returns what reads the answer to a prompt, up to a stop text."""
    del chat
    return parse.Parser(self._tokenizer, _READ, None, prompt=prompt, stop=stops)


def _special(folder: str, tokenizer: Any) -> list[str]:
  """Returns what a tokenizer reads as special tokens, longest first.

  They are declared in tokenizer.json and in the files beside it; a shorter one
  may begin a longer one.
  """
  declared = special_tokens.declared(folder)
  names = {*declared.names.values(), *declared.more}
  names |= {token['content'] for token in declared.added}
  names |= {token['content'] for token in _added(tokenizer)}
  encode = tokenizer.encode
  found = [n for n in names if n and encode(n) != encode(n, special=True)]
  return sorted(found, key=len, reverse=True)


def _added(tokenizer: Any) -> list[dict[str, Any]]:
  """Returns the tokens that a tokenizer.json adds to its vocabulary."""
  if isinstance(tokenizer, ByteTokenizer):
    return [{'content': name} for name in SPECIAL]
  return json.loads(tokenizer.text_json).get('added_tokens', [])


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns messages as templates know them: role and text, and calls."""
  out = []
  for given, read in zip(messages, message.read(messages)):
    if read.prefix:
      raise InputError('messages: a template knows no prefix = true')
    one = {'role': read.role, 'content': read.content}
    if read.reasoning:
      one['reasoning_content'] = read.reasoning
    if read.tool_calls:
      one['tool_calls'] = given['tool_calls']
    out.append(one)
  return out


def _end_of_thinking(tokenizer: Any) -> int | None:
  """Returns the token that ends reasoning, if a tokenizer has both marks."""
  found = pieces.ids_of_marks(tokenizer, _THINKING)
  return found[pieces.END_THINK] if len(found) == len(_THINKING) else None


def _without(value: Any, hidden: Mapping[str, str]) -> Any:
  """Returns JSON values with names of special tokens hidden in all texts."""
  if isinstance(value, str):
    for name, other in hidden.items():
      value = value.replace(name, other)
    return value
  if isinstance(value, Mapping):
    return {key: _without(item, hidden) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_without(item, hidden) for item in value]
  return value


def known(
  found: FormatDialect | TemplateDialect | None, folder: str
) -> FormatDialect | TemplateDialect:
  """Returns a dialect; InputError for a model that has none."""
  if found is None:
    raise InputError(
      f'{folder}: this model has no chat format: no template, no marks of one'
      ' in its tokenizer; sample from it without a chat'
    )
  return found


def choose(
  name: str,
  folder: str,
  tokenizer: Any,
  *,
  published: bool,
  trained: tuple[str, str] | None = None,
  thinking: bool | None = None,
) -> FormatDialect | TemplateDialect | None:
  """Returns how conversations are written, or None for completions only.

  Args:
    name: a format, 'template', 'none', or 'auto': what the run was trained on,
      or else what the folder tells.
    folder: of the model.
    tokenizer: of the model.
    published: whether it is a Hugging Face folder.
    trained: format and folder of the conversations that a run was trained on;
      None: it was on none. Plain ones have no marks: completions only.
    thinking: whether turns of that format thought; None: where they had
      reasoning.

  Raises:
    InputError: the name is unknown, or the tokenizer lacks the format's marks.
  """
  if name == 'auto' and trained:
    name, folder = trained[0], trained[1] or folder
  if trained is None or name != trained[0]:
    thinking = None
  if name in ('none', 'plain', 'r1_zero'):
    return None
  if name == 'template':
    return TemplateDialect(folder, tokenizer)
  if name != 'auto':
    return FormatDialect(formats.get(name), tokenizer, thinking)
  try:
    where = folder if published else None
    return FormatDialect(formats.guess(where, tokenizer), tokenizer)
  except InputError:
    pass
  try:
    return TemplateDialect(folder, tokenizer) if published else None
  except InputError:
    return None
