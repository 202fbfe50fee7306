"""Turns what a request says of its answer's form into the engine's grammar."""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.infer.grammar import Grammar, Matchers

Reader = Callable[[str, Any, int | None], Grammar]


def reader(
  tokenizer: Any, vocab_size: int, ends: Sequence[int]
) -> Reader | None:
  """Returns the function (kind, value, end of thinking) -> grammar.

  None if llguidance is not installed. The function raises InputError for a
  grammar that is wrong, before the engine's thread meets it.

  Args:
    tokenizer: of the model.
    vocab_size: of the model.
    ends: tokens that end an answer.
  """
  if importlib.util.find_spec('llguidance') is None:
    return None
  matchers = Matchers(tokenizer, vocab_size=vocab_size, ends=ends)

  def read(kind: str, value: Any, after: int | None = None) -> Grammar:
    out = grammar(kind, value)
    if after is not None:
      out = behind(out, after)
    matchers.check(out)
    return out

  return read


def grammar(kind: str, value: Any) -> Grammar:
  """Returns the grammar of one kind of response_format and its value."""
  if kind == 'json_object':
    return Grammar('json')
  if kind == 'json_schema':
    return Grammar.of_schema(value)
  return Grammar(kind, value)


def behind(inner: Grammar, mark: int) -> Grammar:
  """Returns a grammar of any text, a mark, and then what `inner` allows.

  So a model thinks freely before its answer has a form.

  Args:
    inner: of the answer.
    mark: the token that ends the thinking.
  """
  if inner.kind == 'regex':
    escaped = re.sub(r'(?<!\\)/', r'\/', inner.text)
    answer = f'ANSWER: /{escaped}/'
    name = 'ANSWER'
  else:
    schema = json.loads(inner.text or '{"type": "object"}')
    if isinstance(schema, bool):
      schema = {} if schema else {'enum': []}
    schema['x-guidance'] = {'whitespace_flexible': inner.whitespace}
    name, answer = 'answer', f'answer: %json {json.dumps(schema)}'
  rules = (
    f'start: THOUGHT <[{mark}]> GAP {name}',
    r'THOUGHT: /(.|\n)*/',
    r'GAP: /\n*/',
    answer,
  )
  return Grammar('lark', '\n'.join(rules))
