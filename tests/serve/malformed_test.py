"""Bodies that are wrong, of 200 kinds and more: each is named, none hurts."""

import json

import httpx2 as httpx
from absl.testing import absltest, parameterized

from deepseek_jax.serve.config import Limits
from tests.serve import served as servers

_CHAT = {'messages': [{'role': 'user', 'content': 'hi'}]}
_TEXT = {'prompt': 'hi'}
_DEEP = {'type': 'object', 'properties': {}}
for _ in range(40):
  _DEEP = {'type': 'object', 'properties': {'a': _DEEP}}
_TOOL = {'type': 'function', 'function': {'name': 'f', 'parameters': {}}}
_CALL = {'id': 'c', 'type': 'function', 'function': {'name': 'f'}}

# field -> wrong values; the message must name the field.
_SHARED = {
  'model': [7, [], {}, True],
  'temperature': ['hot', -0.1, 2.1, True, [], {}, 10**400],
  'top_p': [0, -1, 1.01, 'x', True, [1]],
  'top_k': ['x', 1.5, -2, 10**9, True],
  'min_p': [-0.1, 1.1, 'x'],
  'repetition_penalty': [0, -1, 11, 'x'],
  'presence_penalty': [-2.1, 2.1, 'x', False],
  'frequency_penalty': [-2.1, 2.1, [], {}],
  'n': [0, -1, 9, 1.0, '1', True],
  'seed': ['x', 1.5, 2**63, -(2**63) - 1, True],
  'stop': [7, {}, [7], [''], '', ['a'] * 17, ['a' * 257], [None], [['a']]],
  'stream': ['yes', 1, [], {}],
  'logit_bias': [
    7,
    [],
    'x',
    {'x': 1},
    {'-1': 1},
    {'1.5': 1},
    {'99999': 1},
    {'٣': 1},
    {'1' * 5000: 1},
    {'5': 'x'},
    {'5': 101},
    {'5': -101},
    {'5': True},
    {'5': []},
    {str(i): 1 for i in range(1100)},
  ],
  'response_format': [
    7,
    [],
    'json',
    {},
    {'type': 'yaml'},
    {'type': 7},
    {'type': 'text', 'schema': {}},
    {'type': 'json_object'},  # nothing here constrains answers
    {'type': 'json_schema'},
    {'type': 'json_schema', 'json_schema': 7},
    {'type': 'json_schema', 'json_schema': {'name': 'x'}},
    {'type': 'json_schema', 'json_schema': {'schema': 'x'}},
    {'type': 'json_schema', 'json_schema': {'schema': []}},
    {'type': 'json_schema', 'json_schema': {'schema': _DEEP}},
    {'type': 'json_schema', 'json_schema': {'schema': {'a': 'b' * 70_000}}},
    {'type': 'json_schema', 'json_schema': {'schema': {}, 'extra': 1}},
    {'type': 'json_schema', 'json_schema': {'schema': {}, 'strict': 'x'}},
    {
      'type': 'json_schema',
      'json_schema': {'schema': {'$ref': 'http://127.0.0.1/x'}},
    },
    {
      'type': 'json_schema',
      'json_schema': {'schema': {'a': [{'$ref': 'file:///etc/passwd'}]}},
    },
    {'type': 'regex'},
    {'type': 'regex', 'regex': 7},
    {'type': 'regex', 'regex': 'a' * 70_000},
  ],
  'cache_salt': [7, 'a' * 300],
  'expert_load': [1, 'x'],
  'top_kk': [1],  # no field of anybody's
  'temprature': [1],
  'guided_json': [{}],
  'stream_options': [{}, {'include_usage': True}, 7],  # without stream
}
_OF_TEXTS = {
  'prompt': [
    None,
    7,
    {},
    [],
    [[]],
    [7.5],
    [-1],
    [True],
    ['a', 7],
    [['a']],
    [[1, 2], 'a', []],
    [261],  # past the vocabulary
    [2**31],
    [10**30],
    [None],
    ['a'] * 300,
    'a' * 300,  # past the context
    [5] * 256,
  ],
  'max_tokens': [0, -1, 10**9, 1.5, '7', True],
  'echo': ['x', 1],
  'logprobs': [-1, 21, True, 'x', 1.5],
  'best_of': [2, 0, 'x'],
  'suffix': [7, []],
}
_OF_CHATS = {
  'messages': [
    None,
    [],
    7,
    'hi',
    {},
    [7],
    ['hi'],
    [None],
    [[]],
    [{}],
    [{'role': 'user'}],
    [{'content': 'x'}],
    [{'role': 'root', 'content': 'x'}],
    [{'role': 7, 'content': 'x'}],
    [{'role': [], 'content': 'x'}],
    [{'role': 'user', 'content': 7}],
    [{'role': 'user', 'content': {}}],
    [{'role': 'user', 'content': [7]}],
    [{'role': 'user', 'content': [{}]}],
    [{'role': 'user', 'content': [{'type': 'text', 'text': 7}]}],
    [
      {
        'role': 'user',
        'content': [
          {'type': 'image_url', 'image_url': {'url': 'http://127.0.0.1/x'}}
        ],
      }
    ],
    [
      {
        'role': 'user',
        'content': [{'type': 'file', 'file': {'path': '/etc/passwd'}}],
      }
    ],
    [{'role': 'user', 'content': 'x', 'weight': 1}],
    [{'role': 'user', 'content': 'x', 'tool_calls': [_CALL]}],
    [{'role': 'user', 'content': 'x', 'prefix': True}],
    [{'role': 'tool', 'content': 'x', 'tool_call_id': 'c'}],
    [{'role': 'assistant', 'content': 'x'}],
    [{'role': 'assistant', 'content': 'x', 'prefix': 1}],
    [{'role': 'assistant', 'content': 'x', 'prefix': True}] * 2,
    [{'role': 'assistant', 'tool_calls': 7}],
    [{'role': 'assistant', 'tool_calls': [7]}],
    [{'role': 'assistant', 'tool_calls': [{}]}],
    [{'role': 'assistant', 'tool_calls': [{'function': {}}]}],
    [
      {
        'role': 'assistant',
        'tool_calls': [{'id': 'c', 'function': {'name': 'f', 'arguments': 7}}],
      },
      {'role': 'tool', 'content': 'x', 'tool_call_id': 'c'},
    ],
    [
      {
        'role': 'assistant',
        'tool_calls': [
          {'id': 'c', 'function': {'name': 'f', 'arguments': '{x'}}
        ],
      },
      {'role': 'tool', 'content': 'x', 'tool_call_id': 'c'},
    ],
    [
      {
        'role': 'assistant',
        'tool_calls': [
          {'id': 'c', 'function': {'name': 'f', 'arguments': '[]'}}
        ],
      },
      {'role': 'tool', 'content': 'x', 'tool_call_id': 'c'},
    ],
    [{'role': 'user', 'content': 'x'}] * 1100,
  ],
  'max_tokens': [0, -1, 10**9, 1.5, '7', True],
  'max_completion_tokens': [0, -1, 10**9, 1.5, '7', True],
  'logprobs': [1, 'x', []],
  'top_logprobs': [5, -1, 21, True, 'x'],
  'tools': [
    7,
    {},
    [7],
    [{}],
    [{'type': 'code_interpreter'}],
    [{'type': 'function'}],
    [{'function': {}}],
    [{'function': {'name': ''}}],
    [{'function': {'name': 'a b'}}],
    [{'function': {'name': 'a' * 200}}],
    [{'function': {'name': 'f', 'parameters': 7}}],
    [{'function': {'name': 'f', 'parameters': _DEEP}}],
    [{'function': {'name': 'f', 'description': 7}}],
    [{'function': {'name': 'f', 'strict': 'x'}}],
    [{'function': {'name': 'f', 'code': 'x'}}],
    [_TOOL, _TOOL],
    [_TOOL] * 200,
  ],
  'tool_choice': ['required', 'never', 7, {}, {'function': {}}, []],
  'parallel_tool_calls': ['x', 1],
  'functions': [[]],
  'function_call': ['auto'],
  'thinking': [7, 'enabled', {'type': 'on'}, {'budget': 7}, []],
  'reasoning_effort': ['lots', 7, []],
  'chat_template_kwargs': [7, {'thinking': 'x'}, {'chat_template': 'x'}],
  'modalities': [['audio'], 7],
  'prediction': [{}],
  'audio': [{}],
  'web_search_options': [{}],
  'chat_template': ['{{ 1 }}'],
  'prompt': ['x'],
  'echo': [True],
}
_CASES = [
  (path, base, field, value)
  for path, base, table in (
    ('/v1/completions', _TEXT, _SHARED | _OF_TEXTS),
    ('/v1/chat/completions', _CHAT, _SHARED | _OF_CHATS),
    (
      '/tokenize',
      {},
      {
        'prompt': [7, [], {}],
        'messages': [7, [7], []],
        'add_special_tokens': [1],
      },
    ),
    ('/tokenize', _TEXT, {'x': [1]}),
    (
      '/detokenize',
      {},
      {'tokens': [7, 'x', ['x'], [-1], [10**9], [1.5], [True]]},
    ),
    ('/detokenize', {'tokens': [5]}, {'x': [1]}),
  )
  for field, values in table.items()
  for value in values
]
# What is no JSON object at all: (name, bytes).
_BODIES = (
  ('empty', b''),
  ('cut', b'{"prompt": "x"'),
  ('list', b'[]'),
  ('null', b'null'),
  ('number', b'7'),
  ('text', b'"x"'),
  ('nan', b'{"prompt": "x", "temperature": NaN}'),
  ('infinity', b'{"prompt": "x", "temperature": -Infinity}'),
  ('twice', b'{"prompt": "x", "prompt": "y"}'),
  ('twice_inside', b'{"prompt": "x", "logit_bias": {"5": 1, "5": 2}}'),
  ('utf16', '{"prompt": "x"}'.encode('utf-16')),
  ('latin', b'{"prompt": "\xe9"}'),
  ('half_a_pair', b'{"prompt": "\\ud83d"}'),
  ('half_a_pair_as_key', b'{"prompt": "x", "\\udc00": 1}'),
  ('overlong', b'{"prompt": "\xc0\x80"}'),
  ('nul', b'\0'),
  ('deep', b'{"prompt": ' + b'[' * 100_000 + b']' * 100_000 + b'}'),
  ('digits', b'{"prompt": "x", "seed": ' + b'9' * 5000 + b'}'),
  ('comment', b'{"prompt": "x"} // y'),
  ('two', b'{"prompt": "x"}{"prompt": "y"}'),
  ('form', b'prompt=x'),
  ('xml', b'<prompt>x</prompt>'),
)


def _label(value):
  return json.dumps(value)[:24]


class MalformedTest(parameterized.TestCase):
  """Every wrong body: a 4xx in OpenAI's shape that names the field."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    enter = cls.enterClassContext
    tokenizer = servers.deepseek_tokenizer()
    texts, _ = enter(servers.running(servers.served_bytes()))
    chats, cls.engine = enter(servers.running(servers.served_chat(tokenizer)))
    cls.texts = enter(httpx.Client(base_url=texts.url))
    cls.chats = enter(httpx.Client(base_url=chats.url))

  def ask(self, path, body):
    client = self.chats if 'chat' in path else self.texts
    return client.post(
      path, content=body, headers={'content-type': 'application/json'}
    )

  def check(self, response, word):
    self.assertBetween(response.status_code, 400, 499, response.text)
    error = response.json()['error']
    self.assertEqual(set(error), {'message', 'type', 'param', 'code'})
    self.assertLen(error['message'].splitlines(), 1)
    self.assertLess(len(error['message']), 700)
    self.assertIn(word, error['message'])

  def test_there_are_more_than_200_kinds(self):
    self.assertGreater(len(_CASES) + len(_BODIES), 200)

  @parameterized.parameters(sorted({(path, f) for path, _, f, _ in _CASES}))
  def test_a_wrong_field_is_named(self, path, field):
    for where, base, name, value in _CASES:
      if (where, name) != (path, field):
        continue
      with self.subTest(value=_label(value)):
        body = json.dumps({**base, field: value})
        self.check(self.ask(path, body), field)

  @parameterized.named_parameters(*_BODIES)
  def test_what_is_no_json_object_is_refused(self, body):
    for path in ('/v1/completions', '/v1/chat/completions', '/tokenize'):
      self.check(self.ask(path, body), 'body')

  def test_a_prompt_past_the_context_has_openais_code(self):
    response = self.ask('/v1/completions', json.dumps({'prompt': 'a' * 300}))
    self.assertEqual(
      response.json()['error']['code'], 'context_length_exceeded'
    )

  def test_another_model_is_not_found(self):
    body = json.dumps(_TEXT | {'model': 'gpt-5'})
    response = self.ask('/v1/completions', body)
    self.assertEqual(response.status_code, 404)
    self.assertEqual(response.json()['error']['code'], 'model_not_found')

  def test_suffix_needs_one_text(self):
    for prompt in ([5, 6], ['a', 'b']):
      body = json.dumps({'prompt': prompt, 'suffix': 'x'})
      self.check(self.ask('/v1/completions', body), 'suffix')

  @parameterized.parameters('a\nb', '<b>', '\x00', 'é' * 300, '\u2028')
  def test_a_name_of_any_characters_is_told_in_one_line(self, name):
    response = self.ask('/v1/completions', json.dumps(_TEXT | {name: 1}))
    self.check(response, 'not a field')

  @parameterized.parameters(
    ({'prompt': ['a'] * 40, 'n': 8}, 'prompt', '320 answers'),
    (
      {'prompt': ['a' * 200] * 130, 'echo': True, 'logprobs': 20},
      'echo',
      '546',
    ),
  )
  def test_what_would_fill_the_memory_is_refused(self, body, field, words):
    response = self.ask('/v1/completions', json.dumps(body))
    self.check(response, field)
    self.assertIn(words, response.text)

  def test_other_content_types_are_refused(self):
    # A page elsewhere could send them without asking for leave.
    for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
      response = self.texts.post(
        '/v1/completions',
        content=json.dumps(_TEXT),
        headers={'content-type': kind},
      )
      self.assertEqual(response.status_code, 415)

  def test_a_model_without_chat_format_says_so(self):
    response = self.texts.post('/v1/chat/completions', json=_CHAT)
    self.assertEqual(response.status_code, 400)
    self.assertEqual(response.json()['error']['code'], 'no_chat_format')

  def test_nothing_reached_the_engine_and_it_still_answers(self):
    seen = len(self.engine.seen)
    self.assertEqual(
      self.chats.post('/v1/chat/completions', json=_CHAT).status_code, 200
    )
    self.assertLen(self.engine.seen, seen + 1)
    self.assertLessEqual(seen, 2)

  def test_harmless_fields_of_openai_pass(self):
    more = {
      'user': 'u',
      'metadata': {'a': 'b'},
      'store': False,
      'service_tier': 'auto',
      'parallel_tool_calls': True,
      'temperature': None,
      'stop': None,
      'unheard_of': None,
    }
    response = self.chats.post('/v1/chat/completions', json=_CHAT | more)
    self.assertEqual(response.status_code, 200, response.text)


class LargeTest(absltest.TestCase):
  def test_a_large_body_is_refused_before_it_is_read(self):
    limits = Limits(body=1000, body_seconds=0.3)
    with servers.running(servers.served_bytes(), limits=limits) as (server, _):
      post = lambda **more: httpx.post(
        server.url + '/v1/completions',
        **{'headers': {'content-type': 'application/json'}, **more},
      )
      self.assertEqual(post(content=b' ' * 1001).status_code, 413)
      parts = (b' ' * 100 for _ in range(20))  # without a length
      self.assertEqual(post(content=parts).status_code, 413)
      self.assertEqual(post(content=b'{"prompt": "a"}').status_code, 200)


if __name__ == '__main__':
  absltest.main()
