"""Conversations that chat formats are tested on, and a tokenizer of marks."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deepseek_jax.data import tokenizer as text_tokenizers
from deepseek_jax.infer.formats import parse, pieces

TOOL = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'description': 'Says "é" in <b>.',
    'parameters': {
      'type': 'object',
      'properties': {
        'city': {'type': 'string'},
        'days': {'type': 'integer', 'enum': [1, 2], 'default': 1.0},
      },
      'required': ['city'],
    },
  },
}
BARE = {'type': 'function', 'function': {'name': 'now'}}
NULLS = {
  'type': 'function',
  'function': {'name': 'now', 'description': None, 'parameters': None},
}
SCHEMA = {
  'type': 'json_schema',
  'json_schema': {
    'name': 'n',
    'schema': {'type': 'object', 'properties': {'é': {'type': 'string'}}},
  },
}
JSON = {'type': 'json_object'}
SPELLS = (
  '<｜User｜> <｜Assistant｜><think> </think><｜end▁of▁sentence｜>'
  '<｜begin▁of▁sentence｜> <｜DSML｜tool_calls> <｜System｜>'
  '<｜tool▁calls▁begin｜><｜tool▁outputs▁end｜>'
)
UNICODE = ' a\tb\r\n👩‍👧 漢字 é\u0301 \u202e \ufeff\u2028 🇫🇷\n'


def call(arguments, number=1, name='weather'):
  function = {'name': name, 'arguments': arguments}
  return {'id': f'c{number}', 'type': 'function', 'function': function}


def system(content):
  return {'role': 'system', 'content': content}


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content, reasoning=None, *calls, **more):
  out = {'role': 'assistant', 'content': content, **more}
  if reasoning is not None:
    out['reasoning_content'] = reasoning
  return out | ({'tool_calls': list(calls)} if calls else {})


def tool(content, number=1):
  return {'role': 'tool', 'tool_call_id': f'c{number}', 'content': content}


def reminder(content):
  return {'role': 'latest_reminder', 'content': content}


_S, _U, _A, _T = system, user, assistant, tool
_PARIS = call('{"city": "Paris"}')
_ASKED = [_U('u'), _A('', 'r', _PARIS), _T('sunny')]
_ON, _OFF = {'thinking': True}, {'thinking': False}
_TOOLS = {'tools': [TOOL]}
_ARGUMENTS = (
  '{"s":"a\\"b\\n<c>","n":1.50,"e":1e5,"x":1e-7,"y":2.5e-5,"v":-1e16,"b":true,"z":null,'
  '"l":[1, 2,{"k":"é\\u0001"}],"o":{},"t":""}'
)

# (messages, options) by name.
TALKS = {
  'hi': ([_U('Hi')], _OFF),
  'hi_thinking': ([_U('Hi')], _ON),
  'system': ([_S('Be brief.'), _U('Hi')], _OFF),
  'system_thinking': ([_S('Be brief.'), _U('Hi')], _ON),
  'two_systems': ([_S('a'), _S('b'), _U('u')], _OFF),
  'two_systems_thinking': ([_S('a'), _S('b'), _U('u')], _ON),
  'system_later': ([_U('u'), _S('a'), _U('v')], _OFF),
  'system_later_thinking': ([_U('u'), _S('a'), _U('v')], _ON),
  'system_after_answer': ([_U('u'), _A('x'), _S('a'), _U('v')], _OFF),
  'system_last': ([_U('u'), _S('a')], _OFF),
  'system_only': ([_S('a')], _OFF),
  'system_only_thinking': ([_S('a')], _ON),
  'system_empty': ([_S(''), _U('u')], _OFF),
  'system_empty_thinking': ([_S(''), _U('u')], _ON),
  'system_empty_then_one': ([_S(''), _S('b'), _U('u')], _OFF),
  'system_one_then_empty': ([_S('b'), _S(''), _U('u')], _OFF),
  'system_empty_later': ([_U('u'), _S(''), _U('v')], _OFF),
  'two_users': ([_U('u'), _U('v')], _OFF),
  'two_users_one_empty': ([_U('u'), _U(''), _U('v')], _OFF),
  'two_users_first_empty': ([_U(''), _U('v')], _ON),
  'two_users_last_empty': ([_U('u'), _U('')], _OFF),
  'two_users_empty': ([_U(''), _U('')], _OFF),
  'answered': ([_U('u'), _A('x')], _OFF),
  'answered_thinking': ([_U('u'), _A('x', 'r')], _ON),
  'turns': ([_U('u'), _A('x'), _U('v')], _OFF),
  'turns_reasoned': ([_U('u'), _A('x', 'r'), _U('v')], _ON),
  'turns_reasoned_off': ([_U('u'), _A('x', 'r'), _U('v')], _OFF),
  'turns_many': (
    [_S('s'), _U('u'), _A('x', 'r'), _U('v'), _A('y', 'q'), _U('w')],
    _ON,
  ),
  'two_answers': ([_U('u'), _A('x', 'r'), _A('y', 's'), _U('v')], _ON),
  'answer_first': ([_A('x'), _U('v')], _OFF),
  'answer_only': ([_A('x')], _OFF),
  'answer_only_thinking': ([_A('x')], _ON),
  'empty_user': ([_U('')], _OFF),
  'empty_answer': ([_U('u'), _A(''), _U('v')], _OFF),
  'blanks': ([_S('\ns '), _U(' u\n'), _A('\n\nx \n'), _U('\n')], _OFF),
  'unicode': ([_S(UNICODE), _U(UNICODE), _A(UNICODE), _U(UNICODE)], _OFF),
  'unicode_thinking': ([_U(UNICODE), _A('x', UNICODE), _U(UNICODE)], _ON),
  'spells_marks': ([_S(SPELLS), _U(SPELLS)], _OFF),
  'spells_marks_thinking': ([_S(SPELLS), _U(SPELLS)], _ON),
  'braces': ([_U('{{ 1 + 1 }} {% if %} {x} $y \\1')], _OFF),
  'parts': (
    [_U([{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}])],
    _OFF,
  ),
  'prefix': ([_U('u'), _A('x', prefix=True)], _OFF),
  'prefix_thinking': ([_U('u'), _A('x', prefix=True)], _ON),
  'prefix_reasoned': ([_U('u'), _A('x', 'r', prefix=True)], _ON),
  'prefix_in_reasoning': ([_U('u'), _A('', 'r', prefix=True)], _ON),
  'prefix_of_nothing': ([_U('u'), _A('', prefix=True)], _ON),
  'prefix_later': (
    [_U('u'), _A('x', 'r'), _U('v'), _A('y', 'q', prefix=True)],
    _ON,
  ),
  'prefix_alone': ([_A('x', 'r', prefix=True)], _ON),
  'system_empty_only': ([_S('')], _ON),
  'system_empty_only_tools': ([_S('')], _ON | {'tools': [TOOL]}),
  'system_empty_first_tools': (
    [_S(''), _S('b'), _U('u')],
    {'tools': [TOOL], **_ON},
  ),
  'empty_user_after_result': ([*_ASKED, _U(''), _U('v')], _ON),
  'empty_user_after_result_last': ([*_ASKED, _U('')], _ON),
  'reminder': ([_U('u'), reminder('L')], _OFF),
  'reminder_first': ([reminder('L'), _U('u')], _OFF),
  'reminder_between': ([_U('u'), reminder('L'), _U('v')], _ON),
  'effort_low': ([_U('u')], {'effort': 'low'}),
  'effort_minimal': ([_U('u')], {'effort': 'minimal'}),
  'effort_medium': ([_U('u')], {'effort': 'medium'}),
  'effort_high': ([_U('u')], {'effort': 'high'}),
  'effort_max': ([_S('s'), _U('u')], {'effort': 'max'}),
  'effort_none': ([_U('u')], {'effort': 'none'}),
  'effort_max_off': ([_U('u')], {'effort': 'max', **_OFF}),
  'json_object': ([_S('json'), _U('u')], {'response_format': JSON, **_OFF}),
  'json_object_no_system': ([_U('json')], {'response_format': JSON, **_ON}),
  'json_schema': ([_U('u')], {'response_format': SCHEMA, **_OFF}),
  'json_schema_tools': (
    [_S('s'), _U('u')],
    {'response_format': SCHEMA, **_TOOLS, **_ON},
  ),
  'json_object_two_systems': (
    [_S('a json'), _S('b'), _U('u')],
    {'response_format': JSON, **_TOOLS, **_OFF},
  ),
  'tools': ([_U('u')], _TOOLS | _OFF),
  'tools_thinking': ([_S('s'), _U('u')], _TOOLS | _ON),
  'tools_two': ([_U('u')], {'tools': [TOOL, BARE], **_OFF}),
  'tools_nulls': ([_U('u')], {'tools': [NULLS], **_OFF}),
  'tools_none': ([_U('u')], {'tools': [TOOL], 'tool_choice': 'none', **_OFF}),
  'tools_empty': ([_U('u')], {'tools': [], **_OFF}),
  'tools_two_systems': ([_S('a'), _S('b'), _U('u')], _TOOLS | _ON),
  'tools_system_later': ([_U('u'), _S('a'), _U('v')], _TOOLS | _ON),
  'tools_required': (
    [_U('u')],
    {'tools': [TOOL], 'tool_choice': 'required', **_OFF},
  ),
  'tools_keep_reasoning': ([_U('u'), _A('x', 'r'), _U('v')], _TOOLS | _ON),
  'tools_no_reasoning': ([_U('u'), _A('x'), _U('v')], _TOOLS | _ON),
  'tools_blank_reasoning': (
    [_U('u'), _A('\nx', '\nr\n'), _U('v')],
    _TOOLS | _ON,
  ),
  'called': (_ASKED, _TOOLS | _ON),
  'called_off': (_ASKED, _TOOLS | _OFF),
  'called_no_tools': (_ASKED, _ON),
  'called_answered': ([*_ASKED, _A('It is.', 'q')], _TOOLS | _ON),
  'called_next_user': ([*_ASKED, _A('It is.', 'q'), _U('v')], _TOOLS | _ON),
  'called_next_user_no_tools': ([*_ASKED, _A('z', 'q'), _U('v')], _ON),
  'called_interrupted': ([*_ASKED, _U('v')], _TOOLS | _ON),
  'called_with_content': (
    [_U('u'), _A('Let me see.', 'r', _PARIS), _T('x')],
    _TOOLS | _ON,
  ),
  'called_twice': (
    [*_ASKED, _A('c', 'q', call('{}', 2)), _T('y', 2), _A('z', 'p'), _U('v')],
    _TOOLS | _ON,
  ),
  'two_calls': (
    [_U('u'), _A('', 'r', _PARIS, call('{}', 2)), _T('x'), _T('y', 2)],
    _TOOLS | _ON,
  ),
  'two_calls_out_of_order': (
    [_U('u'), _A('', None, _PARIS, call('{}', 2)), _T('y', 2), _T('x')],
    _TOOLS | _OFF,
  ),
  'two_calls_then_user': (
    [_U('u'), _A('', 'r', _PARIS, call('{}', 2)), _T('x'), _T('', 2), _U('v')],
    _TOOLS | _ON,
  ),
  'call_content_none': (
    [_U('u'), _A(None, None, _PARIS), _T('x'), _A('y')],
    _OFF,
  ),
  'call_without_arguments': ([_U('u'), _A('', None, call('{}')), _T('')], _OFF),
  'call_all_types': ([_U('u'), _A('', None, call(_ARGUMENTS)), _T('x')], _OFF),
  'call_no_json': ([_U('u'), _A('', None, call('nope')), _T('x')], _OFF),
  'call_list': ([_U('u'), _A('', None, call('[1]')), _T('x')], _OFF),
  'call_too_large_number': (
    [_U('u'), _A('', None, call('{"g":1e400}')), _T('x')],
    _OFF,
  ),
  'call_key_twice': (
    [_U('u'), _A('', None, call('{"a":1,"b":2,"a":3}')), _T('x')],
    _OFF,
  ),
  'call_spells_marks': (
    [
      _U('u'),
      _A('', None, call('{"｜DSML｜":"</｜DSML｜parameter><think>"}')),
      _T('</tool_result><｜User｜>'),
    ],
    _OFF,
  ),
  'result_parts': (
    [
      _U('u'),
      _A('', None, call('{}')),
      _T([{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]),
    ],
    _OFF,
  ),
  'system_after_result': ([*_ASKED, _S('x'), _U('y')], _OFF),
}

_WORDS = ('a', '', '\n', ' b ', 'é👩‍👧', '<think>', '</think>', '<｜User｜>')
_WORDS += ('｜DSML｜', '{"x":1}', '</tool_result>', '日本', '\r\n', '"q"', '$T')


def _value(rng, depth=0):
  """Returns a random JSON value."""
  size = rng.randrange(3) if depth < 2 else 0
  kind = rng.randrange(6)
  if kind == 0:
    return [_value(rng, depth + 1) for _ in range(size)]
  if kind == 1:
    return {_words(rng): _value(rng, depth + 1) for _ in range(size)}
  number = rng.random() * 10.0 ** rng.randrange(-12, 25)
  return (_words(rng), number, rng.randrange(-9, 9), rng.choice([None, True]))[
    kind - 2
  ]


def _words(rng):
  """Returns a random text."""
  return ''.join(rng.choices(_WORDS, k=rng.randrange(4)))


def drawn(rng):
  """Returns a random conversation and options."""
  out = []
  for _ in range(rng.randrange(1, 7)):
    role = rng.choice(('system', 'user', 'user', 'answer', 'answer', 'calls'))
    reasoning = rng.choice((None, _words(rng)))
    if role in ('system', 'user'):
      out.append({'role': role, 'content': _words(rng)})
    elif role == 'answer':
      out.append(assistant(_words(rng), reasoning))
    else:
      each = list(range(rng.randrange(1, 4)))
      values = [{_words(rng): _value(rng) for _ in range(2)} for _ in each]
      calls = [call(json.dumps(v), n) for n, v in zip(each, values)]
      out.append(assistant(rng.choice((None, 'c')), reasoning, *calls))
      rng.shuffle(each)
      out += [tool(_words(rng), n) for n in each]
  last = out[-1]
  options = {'thinking': rng.random() < 0.5}
  if last['role'] == 'assistant' and not any('tool_calls' in m for m in out):
    last |= {'prefix': True} if rng.random() < 0.5 else {}
  if 'prefix' not in last and rng.random() < 0.5:
    options['tools'] = [TOOL, BARE]
  if rng.random() < 0.3:
    options['effort'] = rng.choice(('low', 'high', 'max'))
  return out, options


def marked_tokenizer(names=parse._NAMES, merges=True):
  """Returns a byte-level tokenizer that has the marks as special tokens."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: n for n, letter in enumerate(letters)}
  pairs = ['t h', 'i n', 'th in', 'thin k', '> <', '< /'] if merges else []
  for pair in pairs:
    vocab.setdefault(pair.replace(' ', ''), len(vocab))
  merged = [tuple(pair.split()) for pair in pairs]
  model = Tokenizer(models.BPE(vocab=vocab, merges=merged))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  model.decoder = decoders.ByteLevel()
  # Published tokenizers leave `special` out for some of the marks.
  model.add_tokens(
    [
      AddedToken(name, special='think' not in name, normalized=False)
      for name in names
      if name != pieces.DSML
    ]
  )
  if pieces.DSML in names:
    model.add_tokens([AddedToken(pieces.DSML, special=False, normalized=False)])
  return model.to_str()


def tokenizer(**options):
  """Returns the tokenizer as the library reads it."""
  text = marked_tokenizer(**options)
  return text_tokenizers.Tokenizer(text, eos=pieces.EOS)
