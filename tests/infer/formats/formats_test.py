"""The registry, token ids of pieces, turns for training, bad input."""

import tempfile

from absl.testing import absltest, parameterized

from deepseek_jax.data import tokenizer as text_tokenizers
from deepseek_jax.errors import InputError
from deepseek_jax.infer import formats
from deepseek_jax.infer.formats import pieces
from tests import tokenizer_folders as folders
from tests.infer.formats import conversations as talks

_U, _A, _T, _S = talks.user, talks.assistant, talks.tool, talks.system
NAMES = tuple(formats.FORMATS)
_DSML = ('v32', 'v4', 'v41')


def rendered(name, talk):
  """Returns a conversation's pieces, or None if the format can't say it."""
  messages, options = talks.TALKS[talk]
  try:
    return formats.get(name).render(messages, **options)
  except InputError:
    return None


class EncodeTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_text_never_becomes_a_mark(self, name):
    tok = talks.tokenizer()
    marks = set(pieces.ids_of_marks(tok, formats.parse._NAMES).values())
    self.assertLen(marks, len(formats.parse._NAMES))
    compared = 0
    for talk in talks.TALKS:
      found = rendered(name, talk)
      if found is None:
        continue
      ids = formats.encode(tok, found)
      special = [i for i in ids if i in marks]
      want = [piece.text for piece in found if piece.special]
      self.assertEqual([tok.decode([i]) for i in special], want, msg=talk)
      self.assertEqual(tok.decode(ids), formats.text_of(found))
      compared += 1
    self.assertGreaterEqual(compared, 45)

  def test_marks_written_by_a_user_stay_text(self):
    tok = talks.tokenizer()
    marks = set(pieces.ids_of_marks(tok, formats.parse._NAMES).values())
    ids = formats.encode(tok, [formats.Piece(talks.SPELLS)])
    self.assertEmpty(marks & set(ids))
    self.assertEqual(tok.decode(ids), talks.SPELLS)

  def test_neighbouring_texts_are_encoded_as_one(self):
    tok = talks.tokenizer()
    texts = [formats.Piece('t'), formats.Piece(''), formats.Piece('hink')]
    self.assertEqual(formats.encode(tok, texts), tok.encode('think'))
    self.assertLess(len(tok.encode('think')), 5)

  def test_a_missing_mark_is_named(self):
    tok = talks.tokenizer(names=(pieces.BOS, pieces.EOS, pieces.USER))
    with self.assertRaisesRegex(
      InputError, '^tokenizer: lacks <｜Assistant｜>'
    ):
      formats.encode(tok, formats.get('v3').render([_U('u')]))

  def test_marks_are_spelled_only_if_asked_to(self):
    tok = text_tokenizers.ByteTokenizer()
    found = formats.get('v3').render([_U('u'), _A('x'), _U('v')])
    with self.assertRaisesRegex(InputError, 'lacks <｜begin'):
      formats.encode(tok, found)
    ids = formats.encode(tok, found, spell=True)
    want = formats.text_of(found).replace(pieces.EOS, text_tokenizers.EOS)
    self.assertEqual(tok.decode(ids), want)
    self.assertEqual(ids.count(tok.eos_id), 1)

  def test_a_word_that_is_one_token_is_no_mark(self):
    tok = talks.tokenizer(names=(pieces.EOS,))
    self.assertEqual(pieces.ids_of_marks(tok, ('think', '><')), {})


class RegistryTest(parameterized.TestCase):
  def test_unknown_names_list_the_known(self):
    for name in ('v5', '', 'V4'):
      with self.assertRaisesRegex(InputError, 'v3, r1, v32, v4, v41$'):
        formats.get(name)
    with self.assertRaisesRegex(InputError, 'v3, r1, v32, v4, v41$'):
      formats.guess(model_type='llama')
    with self.assertRaisesRegex(InputError, 'v3, r1, v32, v4, v41$'):
      formats.guess(tokenizer=text_tokenizers.ByteTokenizer())

  @parameterized.parameters(
    ('deepseek_v3', 'v3'),
    ('deepseek_v32', 'v32'),
    ('deepseek_v4', 'v4'),
    ('deepseek_v41', 'v41'),
  )
  def test_model_type_decides(self, model_type, want):
    self.assertEqual(formats.guess(model_type=model_type).name, want)
    folder = self.enterContext(tempfile.TemporaryDirectory())
    folders.save(folder, folders.byte_level(), model_type=model_type)
    self.assertEqual(formats.guess(folder).name, want)

  def test_the_template_tells_r1_from_v3(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    template = "{{ '<｜Assistant｜><think>\\n' }}"
    names = {'chat_template': template}
    folders.save(folder, folders.byte_level(), names=names)
    self.assertEqual(formats.guess(folder).name, 'r1')

  def test_the_template_of_v31_is_none_of_them(self):
    template = (
      "{{ '<｜Assistant｜>' }}{% if thinking %}{{ '<think>' }}{% else %}"
      "{{ '</think>' }}{% endif %}"
    )
    for model_type in ('deepseek_v3', 'deepseek_v32'):
      folder = self.enterContext(tempfile.TemporaryDirectory())
      names = {'chat_template': template}
      model = folders.byte_level()
      folders.save(folder, model, model_type=model_type, names=names)
      with self.assertRaisesRegex(InputError, 'V3.1'):
        formats.guess(folder)

  @parameterized.parameters(
    (('<｜User｜>', '<｜Assistant｜>'), 'v3'),
    (('<｜User｜>', '<｜Assistant｜>', '｜DSML｜'), 'v32'),
    (('<｜User｜>', '<｜Assistant｜>', '｜DSML｜', pieces.REMINDER), 'v4'),
    (formats.parse._NAMES, 'v41'),
  )
  def test_marks_decide_without_a_model_type(self, names, want):
    tok = talks.tokenizer(names=(pieces.EOS, *set(names) - {pieces.EOS}))
    self.assertEqual(formats.guess(tokenizer=tok).name, want)


class TurnsTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_a_prompt_begins_with_the_whole(self, name):
    for talk, (messages, options) in talks.TALKS.items():
      found = rendered(name, talk)
      if found is not None:
        chat = formats.get(name)
        whole = chat.render(messages, generation=False, **options)
        begins = formats.text_of(found).startswith(formats.text_of(whole))
        self.assertTrue(begins, msg=talk)

  @parameterized.parameters(*NAMES)
  def test_a_turn_is_the_prompt_and_what_was_generated(self, name):
    for talk, (messages, options) in talks.TALKS.items():
      if rendered(name, talk) is not None:
        with self.subTest(talk):
          self.check_turns(name, messages, options)

  def check_turns(self, name, messages, options):
    chat, tok = formats.get(name), talks.tokenizer()
    if options.get('tool_choice') == 'required':
      options = {**options, 'tool_choice': None}
    turns = chat.turns(messages, **options)
    said = [m for m in messages if m['role'] == 'assistant']
    self.assertLen(turns, len(said))
    where = [n for n, m in enumerate(messages) if m['role'] == 'assistant']
    for n, message, (prompt, answer) in zip(where, said, turns):
      if n:
        want = chat.render(messages[:n], **options)
        self.assertEqual(prompt, want)
      ends = answer[-1:] == [(pieces.EOS, True)]
      self.assertEqual(ends, 'prefix' not in message)
      # What was generated is read back as what the message holds.
      ids = formats.encode(tok, prompt)
      got = chat.parser(tok, ids).parse(formats.encode(tok, answer))
      read = chat.read([*messages[: n + 1]], **options).messages[-1]
      content = (read.content or '').strip('\n')
      self.assertEqual(got.content.strip('\n'), content)
      if got.reasoning_content:
        self.assertEqual(got.reasoning_content, read.reasoning.strip('\n'))
      self.assertLen(got.tool_calls, len(read.tool_calls))

  def test_a_turn_thinks_if_it_has_reasoning(self):
    talk = [_U('u'), _A('x', 'r'), _U('v'), _A('y')]
    for name in ('v32', 'v4', 'v41'):
      turns = formats.get(name).turns(talk)
      self.assertEqual([p[-1].text for p, _ in turns], ['<think>', '</think>'])
      self.assertEqual(
        [formats.text_of(a) for _, a in turns],
        [f'r</think>x{pieces.EOS}', f'y{pieces.EOS}'],
      )

  @parameterized.parameters(
    ('v3', 'turns', False),
    ('v4', 'turns', False),
    ('r1', 'turns_reasoned', True),
    ('v32', 'turns_reasoned', True),
    ('v4', 'turns_reasoned', True),
    ('v41', 'turns_reasoned', True),
    ('v4', 'tools_keep_reasoning', False),
    ('v41', 'called_next_user', False),
    ('v32', 'called_next_user', True),
    ('v32', 'called_answered', False),
    ('v4', 'system_after_answer', True),
    ('v41', 'system_after_answer', False),
    ('v4', 'two_calls_out_of_order', False),
  )
  def test_where_history_is_rewritten(self, name, talk, want):
    messages, options = talks.TALKS[talk]
    got = formats.get(name).rewrites_history(messages, **options)
    self.assertEqual(got, want)


_DEEP = {}
for _ in range(40):
  _DEEP = {'a': _DEEP}


class InputTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 'messages: give at least one'),
    ('Hi', 'messages: give a list'),
    ({'role': 'user'}, 'messages: give a list'),
    (['Hi'], r'messages\[0\]: must be an object'),
    ([{'role': 'robot', 'content': ''}], r"messages\[0\].role = 'robot'"),
    ([{'content': 'x'}], r'messages\[0\].role = None'),
    ([{'role': 'user'}], r'messages\[0\].content: missing'),
    ([_U(7)], r'messages\[0\].content = 7: must be a text'),
    ([_U('\ud800')], r'messages\[0\].content: character 0 is half'),
    ([_U([{'type': 'image_url'}])], r"content\[0\].type = 'image_url'"),
    ([_U(['x'])], r"content\[0\].type = 'x'"),
    ([_U([{'type': 'text', 'text': ['x']}])], r"\[0\].text = \['x'\]: must"),
    ([_U([{'type': 'text'}])], r'content\[0\].text = None: must be a text'),
    ([_U([1] * 9999)], r'content\[0\].type = 1: only'),
    ([_U({'a': 'x' * 9999})], r'messages\[0\].content = .{76} ...: must'),
    ([{**_U('u'), 'weight': 1}], r'messages\[0\].weight: not understood'),
    ([{**_U('u'), 'tool_calls': [{}]}], r'tool_calls\[0\].function.name'),
    ([_U('u'), {**_A('x'), 'tool_calls': 'x'}], 'tool_calls: must be a list'),
    ([{**_U('u'), 'reasoning_content': 'r'}], r'\[0\].reasoning: belongs'),
    ([{**_U('u'), 'prefix': True}], r'\[0\].prefix: belongs'),
    ([_A('x', prefix=1)], r'\[0\].prefix: true only'),
    ([_A('x', prefix=True), _U('u')], r'\[0\].prefix: true only'),
    ([_U('u'), _T('x')], r'\[1\]: role tool must follow'),
    ([_A('', None, talks.call('{}')), _U('u')], r'\[1\]: follows tool_calls'),
    ([_A('', None, talks.call('{}')), _T('', 9)], r"tool_call_id = 'c9'"),
    ([_A('', None, talks.call('{}')), _T(''), _T('')], r'\[2\]: role tool'),
    ([{**_A('x'), 'function_call': {'a': 1}}], 'function_call: not supported'),
  )
  def test_a_bad_message_is_named_in_one_line(self, messages, want):
    for name in NAMES:
      with self.assertRaisesRegex(InputError, want) as caught:
        formats.get(name).render(messages)
      self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(
    ({'effort': 'huge'}, "effort = 'huge': must be one of none, minimal, low"),
    ({'tools': [{'type': 'function'}]}, r'tools\[0\].function.name'),
    ({'tools': [{**talks.TOOL, 'type': 'web'}]}, r"tools\[0\].type = 'web'"),
    ({'tools': [{'name': 'x', 'parameters': 3}]}, 'parameters: must be'),
    (
      {'tools': [{'name': 'x', 'a': {1, 2}}]},
      r'tools\[0\].function: is no JSON',
    ),
    ({'response_format': {'type': 'xml'}}, "response_format.type = 'xml'"),
    ({'response_format': {'type': 'json_schema'}}, 'response_format.type'),
    ({'tools': 5}, 'tools: give a list'),
    ({'tools': [{'name': '\ud800'}]}, r'tools\[0\].function: is no JSON'),
    ({'tools': [{'name': 'x', 'parameters': _DEEP}]}, 'is deeper than 32'),
    ({'effort': ['x']}, 'effort = '),
    ({'response_format': ['x']}, 'response_format.type'),
    ({'tool_choice': 'banana'}, "tool_choice = 'banana': must be auto"),
    ({'tool_choice': 'required'}, "tool_choice = 'required': needs tools"),
    (
      {'tool_choice': 'required', 'tools': [talks.TOOL], 'thinking': True},
      'thinking off',
    ),
  )
  def test_a_bad_option_is_named_in_one_line(self, options, want):
    with self.assertRaisesRegex(InputError, want) as caught:
      formats.get('v4').render([_U('u')], **options)
    self.assertNotIn('\n', str(caught.exception))

  def test_a_role_nested_too_deeply_to_show_is_named(self):
    role = []
    for _ in range(5000):
      role = [role]
    with self.assertRaisesRegex(InputError, r'messages\[0\].role = <list>'):
      formats.get('v4').render([{'role': role, 'content': ''}])

  def test_calls_without_results_open_no_answer(self):
    talk = [_U('u'), _A('', None, talks.call('{}'))]
    for name in NAMES:
      chat = formats.get(name)
      with self.assertRaisesRegex(InputError, 'the last tool_calls have no'):
        chat.render(talk)
      self.assertNotEmpty(chat.render(talk, generation=False))
      self.assertLen(chat.turns(talk), 1)

  def test_arguments_nested_too_deeply_are_one_text(self):
    for depth in (900, 100000):
      text = '{"a":' + '[' * depth + ']' * depth + '}'
      talk = [_U('u'), _A('', None, talks.call(text)), _T('t')]
      found = formats.text_of(formats.get('v4').render(talk))
      self.assertIn(text if depth > 900 else '[' * depth, found)

  def test_openais_developer_is_a_system_message(self):
    for name in NAMES:
      chat = formats.get(name)
      got = chat.render([{'role': 'developer', 'content': 's'}, _U('u')])
      self.assertEqual(got, chat.render([_S('s'), _U('u')]))

  def test_what_clients_send_along_changes_nothing(self):
    extra = {'name': 'bob', 'refusal': None, 'annotations': [], 'audio': None}
    for name in NAMES:
      chat = formats.get(name)
      talk = [_U('u'), _A('x'), _U('v')]
      got = chat.render([{**m, **extra} for m in talk])
      self.assertEqual(got, chat.render(talk))

  def test_arguments_may_be_an_object(self):
    chat = formats.get('v4')
    given = [talks.call({'city': 'Köln'}), talks.call('{"city": "Köln"}')]
    asked = [[_U('u'), _A('', None, one), _T('t')] for one in given]
    texts = [chat.render(each) for each in asked]
    self.assertEqual(texts[0], texts[1])

  def test_results_without_ids_answer_in_order(self):
    chat = formats.get('v4')
    calls = [talks.call('{}'), talks.call('{}', 2)]
    results = [{'role': 'tool', 'content': c} for c in 'ab']
    got = chat.render([_U('u'), _A('', None, *calls), *results])
    want = [_T('a'), _T('b', 2)]
    self.assertEqual(got, chat.render([_U('u'), _A('', None, *calls), *want]))


if __name__ == '__main__':
  absltest.main()
