"""DeepSeek-V3.2, by cases worked out by hand from its published encoding."""

import re

from absl.testing import absltest, parameterized

from deepseek_jax.infer import formats
from deepseek_jax.infer.formats import pieces
from tests.infer.formats import conversations as talks

_B, _E, _D = pieces.BOS, pieces.EOS, pieces.DSML
_U, _A, _T, _S = talks.user, talks.assistant, talks.tool, talks.system
_ON, _OFF = {'thinking': True}, {'thinking': False}


def block(*calls):
  """Returns a block of calls [(name, [(key, text or not, value)])]."""
  out = ''
  for name, parameters in calls:
    out += f'<{_D}invoke name="{name}">\n'
    out += '\n'.join(
      f'<{_D}parameter name="{key}" string="{kind}">{value}</{_D}parameter>'
      for key, kind, value in parameters
    )
    out += f'\n</{_D}invoke>\n'
  return f'\n\n<{_D}function_calls>\n{out}</{_D}function_calls>'


_PARIS = talks.call('{"city": "Paris", "days": 2}')
_BLOCK = block(('weather', [('city', 'true', 'Paris'), ('days', 'false', '2')]))
_NONE = block(('weather', []))
_ASK = [_U('u'), _A('c', 'r', _PARIS)]
_RESULT = '\n\n<function_results>\n<result>t</result>\n</function_results>\n\n'

CASES = {
  'hi': ([_U('u')], _OFF, f'{_B}<｜User｜>u<｜Assistant｜></think>'),
  'hi_thinking': ([_U('u')], _ON, f'{_B}<｜User｜>u<｜Assistant｜><think>'),
  'system': (
    [_S('s'), _U('u')],
    _ON,
    f'{_B}s<｜User｜>u<｜Assistant｜><think>',
  ),
  'systems_stay_in_place': (
    [_S('s'), _S('t'), _U('u'), _S('w'), _U('v')],
    _OFF,
    f'{_B}st<｜User｜>u<｜Assistant｜></think>w<｜User｜>v<｜Assistant｜></think>',
  ),
  'reasoning_is_dropped': (
    [_U('u'), _A('x', 'r'), _U('v')],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜></think>x{_E}<｜User｜>v<｜Assistant｜><think>',
  ),
  'last_reasoning_stays': (
    [_U('u'), _A('x', 'r')],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜><think>r</think>x{_E}',
  ),
  'reasoning_off': (
    [_U('u'), _A('x', 'r')],
    _OFF,
    f'{_B}<｜User｜>u<｜Assistant｜></think>x{_E}',
  ),
  'called': (
    [*_ASK, _T('t')],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜><think>r</think>c{_BLOCK}{_E}{_RESULT}<think>',
  ),
  'called_off': (
    [*_ASK, _T('t')],
    _OFF,
    f'{_B}<｜User｜>u<｜Assistant｜></think>c{_BLOCK}{_E}{_RESULT}</think>',
  ),
  'reasoning_stays_while_tools_are_called': (
    [*_ASK, _T('t'), _A('', 'q', talks.call('{}')), _T('t'), _A('y', 'p')],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜><think>r</think>c{_BLOCK}{_E}{_RESULT}'
    f'<think>q</think>{_NONE}{_E}{_RESULT}<think>p</think>y{_E}',
  ),
  'a_user_ends_it': (
    [*_ASK, _T('t'), _A('y', 'p'), _U('v')],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜></think>c{_BLOCK}{_E}{_RESULT}</think>y{_E}'
    '<｜User｜>v<｜Assistant｜><think>',
  ),
  'results_in_order_of_calls': (
    [
      _U('u'),
      _A(None, None, _PARIS, talks.call('{"l": [1, "é"]}', 2)),
      _T('b', 2),
      _T('a'),
    ],
    _OFF,
    f'{_B}<｜User｜>u<｜Assistant｜></think>'
    + block(
      ('weather', [('city', 'true', 'Paris'), ('days', 'false', '2')]),
      ('weather', [('l', 'false', '[1, "é"]')]),
    )
    + f'{_E}\n\n<function_results>\n<result>a</result>\n<result>b</result>'
    '\n</function_results>\n\n</think>',
  ),
  'prefix': (
    [_U('u'), _A('x', 'r', prefix=True)],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜><think>r</think>x',
  ),
  'prefix_in_reasoning': (
    [_U('u'), _A('', 'r', prefix=True)],
    _ON,
    f'{_B}<｜User｜>u<｜Assistant｜><think>r',
  ),
  'schema': (
    [_S('s'), _U('u')],
    {'response_format': talks.SCHEMA},
    f'{_B}s\n\n## Response Format:\n\nYou MUST strictly adhere to the following'
    ' schema to reply:\n{"type": "object", "properties": {"é": {"type":'
    ' "string"}}}<｜User｜>u<｜Assistant｜></think>',
  ),
  'unicode': (
    [_U(talks.UNICODE), _A(talks.UNICODE)],
    _OFF,
    f'{_B}<｜User｜>{talks.UNICODE}<｜Assistant｜></think>{talks.UNICODE}{_E}',
  ),
}


class HandTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_case_worked_out_by_hand(self, name):
    messages, options, want = CASES[name]
    last = messages[-1]
    generation = last['role'] != 'assistant' or 'prefix' in last
    chat = formats.get('v32')
    got = chat.render(messages, generation=generation, **options)
    self.assertEqual(formats.text_of(got), want)

  def test_tools_stand_in_the_first_system_message(self):
    chat = formats.get('v32')
    tools = {'tools': [talks.TOOL, talks.BARE]}
    for messages, start in (
      ([_U('u')], _B),
      ([_S('s'), _U('u')], f'{_B}s'),
    ):
      text = formats.text_of(chat.render(messages, **tools))
      self.assertTrue(
        text.startswith(f'{start}\n\n## Tools\n\nYou have access')
      )
      end = (
        '<functions>\n{"name": "weather", "description":'
        ' "Says \\"é\\" in <b>.", "parameters": {"type": "object",'
        ' "properties": {"city": {"type":'
        ' "string"}, "days": {"type": "integer", "enum": [1, 2], "default":'
        ' 1.0}}, "required": ["city"]}}\n{"name": "now"}\n</functions>\n'
        '<｜User｜>u<｜Assistant｜></think>'
      )
      self.assertTrue(text.endswith(end))
    self.assertLen(re.findall(f'<{_D}invoke name="', text), 2)
    self.assertIn('\n\n<think>...thinking about results</think>\n\n', text)

  def test_every_conversation_renders(self):
    chat, tok = formats.get('v32'), talks.tokenizer()
    (begin,) = tok.encode(_B, special=True)
    for name, (messages, options) in talks.TALKS.items():
      if 'reminder' in name or 'effort' in options:
        continue
      ids = formats.encode(tok, chat.render(messages, **options))
      self.assertEqual(ids.count(begin), 1, msg=name)


if __name__ == '__main__':
  absltest.main()
