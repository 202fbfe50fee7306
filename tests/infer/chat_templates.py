"""Renders chat templates here and in transformers, and counts what is equal.

python -m tests.infer.chat_templates SOURCE FILE... >> chat_templates.tsv

prints a row for each: where it is from, its name and hash, how many renderings
were compared, equal in text, and refused by both. The texts stay where they
are; chat_templates_test.py renders those of installed packages again.
"""

import hashlib
import itertools
import pathlib
import sys
from typing import NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.infer import chat

LIST = pathlib.Path(__file__).with_suffix('.tsv')
NAMES = {
  'bos_token': '<s>',
  'eos_token': '</s>',
  'pad_token': '<pad>',
  'unk_token': '<unk>',
}
_TOOL = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'description': 'Says <b>é</b>.',
    'parameters': {
      'type': 'object',
      'properties': {
        'city': {'type': 'string', 'description': 'of it'},
        'days': {'type': 'integer', 'enum': [1, 2]},
      },
      'required': ['city'],
    },
  },
}
_CALL = {
  'type': 'function',
  'id': 'abc123456',
  'function': {'name': 'weather', 'arguments': {'city': 'Köln', 'days': 2}},
}
_ASKED = {'role': 'user', 'content': 'a'}
_CALLED = {'role': 'assistant', 'content': None, 'tool_calls': [_CALL]}
_RESULT = {
  'role': 'tool',
  'name': 'weather',
  'tool_call_id': 'abc123456',
  'content': '{"t": 3}',
}


def _turn(role, content, **more):
  return {'role': role, 'content': content, **more}


TALKS = (
  [_ASKED],
  [_turn('system', 'Be brief.'), _turn('user', ' Hi <b>&"é 😀\n')],
  [_ASKED, _turn('assistant', 'b'), _turn('user', 'c')],
  [_ASKED, _turn('assistant', '<think>\nhm\n</think>\n\nb'), _ASKED],
  [
    _ASKED,
    _turn('assistant', 'b', reasoning_content='why'),
    _ASKED,
    _turn('assistant', 'd', thinking='so'),
  ],
  [_ASKED, _CALLED, _RESULT, _turn('assistant', '3')],
  [_ASKED, {**_CALLED, 'content': ''}, _RESULT],
  [_turn('user', [{'type': 'text', 'text': 'look'}, {'type': 'image'}])],
  [_turn('developer', 'd'), _turn('user', 'x')],
  [_turn('assistant', 'b'), _turn('user', 'x')],
)
_DOCUMENTS = [{'title': 'A', 'text': 'B é'}]
# (tools, documents, add_generation_prompt, other variables)
WAYS = (
  *itertools.product(
    (None, [_TOOL]), (None,), (True, False), ({}, {'enable_thinking': False})
  ),
  ([_TOOL], _DOCUMENTS, True, {'thinking': True}),
)


class Count(NamedTuple):
  """Holds what was found about one template."""

  compared: int
  equal: int  # the same text
  refused: int  # by both
  different: list  # (talk, way, theirs, ours)


def compare(text: str, talks=TALKS, ways=WAYS) -> Count:
  """Renders a template in every way, here and in transformers."""
  equal, refused, different = 0, 0, []
  for talk, way in itertools.product(talks, ways):
    theirs, ours = _theirs(text, talk, way), _ours(text, talk, way)
    equal += theirs is not None and ours == theirs
    refused += theirs is None and ours is None
    if ours != theirs:
      different.append((talk, way, theirs, ours))
  return Count(len(talks) * len(ways), equal, refused, different)


def _theirs(text, talk, way):
  from transformers.utils import chat_template_utils as utils

  tools, documents, prompt, variables = way
  talk = utils._normalize_chat_messages(talk)
  try:
    return utils.render_jinja_template(
      conversations=[talk],
      chat_template=text,
      tools=tools,
      documents=documents,
      add_generation_prompt=prompt,
      **NAMES,
      **variables,
    )[0][0]
  except Exception:  # whatever a template raises
    return None


def _ours(text, talk, way):
  tools, documents, prompt, variables = way
  try:
    return chat.render(
      {**NAMES, 'chat_template': text},
      talk,
      tools=tools,
      documents=documents,
      add_generation_prompt=prompt,
      **variables,
    )
  except InputError:
    return None


def sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def main(source, *files):
  for file in map(pathlib.Path, files):
    text = file.read_text(encoding='utf-8')
    found = compare(text)
    row = (source, file.name, sha256(text), *found[:3], len(found.different))
    print(*row, sep='\t', flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
