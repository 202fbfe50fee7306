"""V3 equals the template in the trl wheel; R1 is worked out by hand from it."""

import importlib.util
import pathlib

from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.infer import formats
from deepseek_jax.infer.formats import pieces
from tests.infer.formats import conversations as talks

_B, _E = pieces.BOS, pieces.EOS
_U, _A = talks.user, talks.assistant
_CALLS = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>'
_END = '<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
_OPTIONS = {'tools', 'effort', 'response_format', 'tool_choice'}


def fits(messages, options):
  """Returns whether the template knows all that a conversation has."""
  known = ('system', 'user', 'assistant', 'tool')
  return not options.keys() & _OPTIONS and all(
    m['role'] in known
    and isinstance(m['content'], str | None)
    and 'prefix' not in m
    for m in messages
  )


TALKS = [name for name, talk in talks.TALKS.items() if fits(*talk)]
MORE = {
  'thinks_in_content': [_U('u'), _A('<think>\nr\n</think>\n\nx'), _U('v')],
  'ends_two_thoughts': [_U('u'), _A('a</think>b</think>c'), _U('v')],
  'thinks_after_result': [
    _U('u'),
    _A('', None, talks.call('{}')),
    talks.tool('t'),
    _A('a</think>b'),
  ],
  'no_user': [talks.system('s'), _A('x')],
}


def theirs(messages, generation):
  """Returns the text of the shipped template, rendered by transformers."""
  from transformers.utils import chat_template_utils

  spec = importlib.util.find_spec('trl')
  # Its file is read; the package itself is not imported.
  folder = pathlib.Path(spec.origin).parent / 'chat_templates'
  text = (folder / 'deepseekv3.jinja').read_text(encoding='utf-8')
  out, _ = chat_template_utils.render_jinja_template(
    conversations=[messages],
    chat_template=text,
    add_generation_prompt=generation,
    bos_token=_B,
    eos_token=_E,
  )
  return out[0]


class TemplateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for name in ('trl', 'transformers'):
      if importlib.util.find_spec(name) is None:
        self.skipTest(f'{name} is not installed')

  def test_enough_is_compared(self):
    self.assertGreaterEqual(len(TALKS), 40)

  @parameterized.product(
    talk=(*TALKS, *MORE), generation=(True, False), name=('v3', 'r1')
  )
  def test_text_is_that_of_transformers(self, talk, generation, name):
    messages = MORE[talk] if talk in MORE else talks.TALKS[talk][0]
    want = theirs(messages, generation)
    chat = formats.get(name)
    got = chat.render(messages, generation=generation, thinking=True)
    self.assertEqual(formats.text_of(got), want)
    # Without thinking the prompt only names the assistant.
    got = chat.render(messages, generation=generation, thinking=False)
    self.assertEqual(formats.text_of(got), want.removesuffix('<think>\n'))


class HandTest(parameterized.TestCase):
  """Cases worked out by hand from the published description of R1."""

  def check(self, messages, want, name='r1', **options):
    got = formats.get(name).render(messages, **options)
    self.assertEqual(formats.text_of(got), want)

  def test_the_prompt_of_r1_opens_the_reasoning(self):
    self.check([_U('u')], f'{_B}<｜User｜>u<｜Assistant｜><think>\n')
    self.check([_U('u')], f'{_B}<｜User｜>u<｜Assistant｜>', name='v3')

  def test_earlier_reasoning_is_dropped(self):
    want = (
      f'{_B}<｜User｜>u<｜Assistant｜>x{_E}<｜User｜>v<｜Assistant｜><think>\n'
    )
    self.check([_U('u'), _A('x', 'r'), _U('v')], want)
    # Everything up to </think>, the newlines behind it stay.
    want = want.replace('x', '\n\nx', 1)
    self.check([_U('u'), _A('<think>\nr\n</think>\n\nx'), _U('v')], want)

  def test_a_prefix_is_left_open(self):
    start = f'{_B}<｜User｜>u<｜Assistant｜><think>\n'
    self.check([_U('u'), _A('', 'r', prefix=True)], f'{start}r')
    self.check([_U('u'), _A('x', 'r', prefix=True)], f'{start}r\n</think>\n\nx')
    self.check(
      [_U('u'), _A('x', prefix=True)], f'{_B}<｜User｜>u<｜Assistant｜>x', 'v3'
    )

  def test_calls_and_results(self):
    call = f'{_CALLS}weather\n```json\n{{"a": 1}}\n```{_END}{_E}'
    out = (
      '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>t<｜tool▁output▁end｜>'
    )
    asked = [_U('u'), _A('c', 'r', talks.call('{"a": 1}')), talks.tool('t')]
    want = f'{_B}<｜User｜>u<｜Assistant｜>c{call}{out}<｜tool▁outputs▁end｜>'
    self.check(asked, want)
    self.check([*asked, _A('x')], f'{want}x{_E}', generation=False)

  def test_a_turn_is_as_it_was_generated(self):
    talk = [_U('u'), _A('x', 'r'), _U('v'), _A('y'), _U('w')]
    start = f'{_B}<｜User｜>u<｜Assistant｜>'
    turns = [
      tuple(map(formats.text_of, turn))
      for turn in formats.get('r1').turns(talk)
    ]
    self.assertEqual(
      turns,
      [
        (f'{start}<think>\n', f'r\n</think>\n\nx{_E}'),
        (f'{start}x{_E}<｜User｜>v<｜Assistant｜>', f'y{_E}'),
      ],
    )

  def test_reasoning_inside_the_content_is_a_turns_reasoning(self):
    talk = [_U('u'), _A('<think>\nr\n</think>\n\nx')]
    ((prompt, answer),) = formats.get('r1').turns(talk)
    self.assertEqual(prompt[-2:], [('<think>', True), ('\n', False)])
    self.assertEqual(formats.text_of(answer), f'r\n</think>\n\nx{_E}')
    self.assertIn(('</think>', True), answer)

  @parameterized.parameters(
    ('tools', [talks.TOOL]),
    ('effort', 'high'),
    ('response_format', {'type': 'json_object'}),
    ('tool_choice', 'required'),
  )
  def test_what_the_template_would_skip_is_named(self, name, value):
    for chat in ('v3', 'r1'):
      with self.assertRaisesRegex(InputError, f'^{name}: .* {chat} '):
        formats.get(chat).render([_U('u')], **{name: value})

  def test_a_role_that_the_template_would_skip_is_named(self):
    with self.assertRaisesRegex(InputError, r'messages\[1\].role'):
      formats.get('v3').render([_U('u'), talks.reminder('L')])


if __name__ == '__main__':
  absltest.main()
