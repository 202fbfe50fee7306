"""Renders conversations in DeepSeek's chat formats, and parses their answers.

chat = formats.get('v4')
ids = formats.encode(tokenizer, chat.render(messages, tools=tools))
answer = chat.parser(tokenizer, ids).parse(new_ids)
"""

import os
from typing import Any

from deepseek_jax.data import special_tokens
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.formats import pieces
from deepseek_jax.infer.formats.base import Format
from deepseek_jax.infer.formats.message import Message, ToolCall
from deepseek_jax.infer.formats.parse import Delta, Parsed, Parser
from deepseek_jax.infer.formats.pieces import Piece, encode, joined, text_of
from deepseek_jax.infer.formats.v3 import R1, V3
from deepseek_jax.infer.formats.v4 import V4, V41
from deepseek_jax.infer.formats.v32 import V32

_ALL = (V3(), R1(), V32(), V4(), V41())
FORMATS: dict[str, Format] = {each.name: each for each in _ALL}
_MODEL_TYPES = {
  'deepseek_v3': 'v3',
  'deepseek_v32': 'v32',
  'deepseek_v4': 'v4',
  'deepseek_v41': 'v41',
}


def get(name: str) -> Format:
  """Returns the format of a name; InputError lists the names."""
  if name not in FORMATS:
    raise InputError(
      f'chat format {name!r}: must be one of {", ".join(FORMATS)}'
    )
  return FORMATS[name]


def guess(
  folder: str | None = None,
  tokenizer: Tokenizer | ByteTokenizer | None = None,
  model_type: str | None = None,
) -> Format:
  """Returns the format of a published model.

  What decides, in this order: its model_type; marks that only one format has.
  R1 shares V3's model_type and marks: its template opens the reasoning.

  Args:
    folder: Hugging Face folder.
    tokenizer: of the model.
    model_type: of config.json, if not to be read from the folder.

  Raises:
    InputError: nothing decides; lists the names to choose from.
  """
  template = ''
  if folder is not None:
    folder = os.path.expanduser(folder)
    config = special_tokens.read(folder, 'config.json')
    model_type = model_type or config.get('model_type')
    template = _template(folder)
  name = _MODEL_TYPES.get(model_type)
  if name is None and model_type is None and tokenizer is not None:
    name = _by_marks(tokenizer)
  if name is None:
    raise InputError(
      f'no chat format is known for model_type {model_type!r}: choose one of'
      f' {", ".join(FORMATS)}'
    )
  opening = template.rpartition(pieces.ASSISTANT)[2]
  if pieces.THINK in opening and pieces.END_THINK in opening:
    raise InputError(
      f'{folder}: its chat template is that of DeepSeek-V3.1, for which no'
      f' format is known: render the template, or choose one of'
      f' {", ".join(FORMATS)}'
    )
  if name == 'v3' and pieces.THINK in opening:
    name = 'r1'
  return FORMATS[name]


def _by_marks(tokenizer: Tokenizer | ByteTokenizer) -> str | None:
  """Returns the format that a tokenizer's special tokens tell of."""
  wanted = (pieces.USER, pieces.ASSISTANT, pieces.DSML, pieces.SYSTEM)
  wanted += (pieces.REMINDER,)
  found = pieces.ids_of_marks(tokenizer, wanted)
  if pieces.USER not in found or pieces.ASSISTANT not in found:
    return None
  for mark, name in (
    (pieces.SYSTEM, 'v41'),
    (pieces.REMINDER, 'v4'),
    (pieces.DSML, 'v32'),
  ):
    if mark in found:
      return name
  return 'v3'


def _template(folder: str) -> str:
  """Returns the chat template of a folder; '' if it has none."""
  path = os.path.join(folder, 'chat_template.jinja')
  if os.path.isfile(path):
    try:
      with open(path, encoding='utf-8') as file:
        return file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f'{path}: cannot be read: {error}') from None
  found: Any = special_tokens.read(folder, 'tokenizer_config.json')
  found = found.get('chat_template')
  return found if isinstance(found, str) else ''
