"""Certifies text: both sides read the same tokens in it.

The ids of prompts are compared with those of transformers' AutoTokenizer, with
what begins and closes a text, those of a chat, and the tokens that end
generation.
"""

import os
from typing import Any

from deepseek_jax.data import boundaries as boundaries_lib
from deepseek_jax.data import special_tokens
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.errors import InputError
from deepseek_jax.infer import chat

TEXTS = (
  '',
  ' ',
  'a',
  ' a',
  'A mixture of experts keeps most of its parameters idle.',
  'def route(scores, k):\n  return sorted(scores)[:k]\n\n\n\t# 12345678\r\n',
  'En 1905, trois articles ont changé la physique. 稀疏模型只计算需要的部分。',
  'e\u0301 \ufb01 \u212b \u00a0\u3000\u200b\ufeff \ufffd',
  '👩‍👧‍👦🏳️‍🌈 🇫🇷 😀😀😀😀😀',
  "  it's  I'LL\n\n \n 3.14159 * 2**10 = 3216.99   ",
)
TALKS = (
  [{'role': 'user', 'content': 'Hi'}],
  [
    {'role': 'user', 'content': ' 2 + 2? 😀\n'},
    {'role': 'assistant', 'content': '4.'},
    {'role': 'user', 'content': 'And 稀疏?'},
  ],
)


def compare(folder: str, their_ends: list[int]) -> dict[str, Any]:
  """Compares a folder's tokens here and in transformers.

  Args:
    folder: Hugging Face folder.
    their_ends: token ids that end generation in transformers.

  Returns:
    'passed'; 'compared' and 'equal', counts of texts; 'different', the texts
    that aren't; 'begins', 'ends' and 'their_ends', ids; 'notes'. A folder
    without tokenizer.json, or whose tokenizer transformers can't read, passes
    with 0 compared and a note that says so.
  """
  if not os.path.exists(os.path.join(folder, 'tokenizer.json')):
    return _none('the folder has no tokenizer.json')
  tokenizer = tokenizers.from_file(folder)
  if tokenizer.kind == 'bytes':
    return _none('transformers has no tokenizer of bytes')
  theirs = _theirs(folder)
  if isinstance(theirs, str):
    return _none(theirs)
  around = boundaries_lib.boundaries(folder, tokenizer)
  names = special_tokens.declared(folder).names.values()
  texts = [*TEXTS, *(f'a {name}b{name} c' for name in names)]
  pairs = [
    (
      text,
      around.around(tokenizer.encode(text, special=True)),
      theirs(text)['input_ids'],
    )
    for text in texts
  ]
  if getattr(theirs, 'chat_template', None):
    pairs += [_talk(folder, tokenizer, theirs, talk) for talk in TALKS]
  different = [text for text, ours, other in pairs if ours != list(other)]
  missed = sorted(set(their_ends) - set(around.ends))
  notes = [f'ends generation in transformers alone: {i}' for i in missed]
  return {
    'passed': not different and not missed,
    'compared': len(pairs),
    'equal': len(pairs) - len(different),
    'different': different,
    'begins': list(around.begins),
    'ends': list(around.ends),
    'their_ends': their_ends,
    'notes': [*around.notes, *notes],
  }


def _none(note: str) -> dict[str, Any]:
  """Returns the result when nothing could be compared, and why."""
  return {
    'passed': True,
    'compared': 0,
    'equal': 0,
    'different': [],
    'notes': [f'tokens of text are not compared: {note}'],
  }


def _theirs(folder: str) -> Any:
  """Returns AutoTokenizer of the folder, or why there is none."""
  import transformers

  try:
    return transformers.AutoTokenizer.from_pretrained(
      folder, trust_remote_code=False
    )
  except Exception as error:  # whatever a foreign loader raises
    return f'AutoTokenizer: {" ".join(str(error).split())[:200]}'


def _talk(
  folder: str, tokenizer: Any, theirs: Any, talk: list[dict[str, str]]
) -> tuple[str, list[int], list[int]]:
  """Returns (name, our ids, their ids) of a conversation."""
  name = f'chat of {len(talk)} messages'
  try:
    other = theirs.apply_chat_template(
      talk, add_generation_prompt=True, return_dict=False
    )
  except Exception:  # a template may refuse; then both have to
    other = []
  try:
    text = chat.render(chat.template_config(folder), talk)
    ours = tokenizer.encode(text, special=True)
  except InputError:
    ours = []
  return name, ours, other
