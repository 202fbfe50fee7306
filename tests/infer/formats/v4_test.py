"""DeepSeek-V4 and V4.1: equal to deepseek-recipe, in text, marks and ids."""

import json
import random

from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.infer import formats
from tests.infer.formats import conversations as talks

try:
  import deepseek_recipe as recipe
except ImportError:
  recipe = None
MODELS = {'v4': 'DeepSeek-V4-Pro', 'v41': 'DeepSeek-V4.1-Flash'}


def theirs(name, messages, options):
  """Returns DeepSeek's encoding and the conversation that it encodes."""
  body = {'model': MODELS[name], 'messages': messages}
  body |= {k: v for k, v in options.items() if k not in ('thinking', 'effort')}
  if 'effort' in options:
    body['reasoning_effort'] = options['effort']
  if options.get('thinking') is False:
    body['thinking'] = {'type': 'disabled'}
  request = recipe.ChatCompletionRequest(body)
  encodings = {
    'v4': recipe.DeepseekV4Encoding,
    'v41': recipe.DeepseekV41Encoding,
  }
  done = request.convert(recipe.ConversionOptions())
  return encodings[name](), done.conversation


def ranges(pieces):
  out, at = [], 0
  for text, special in pieces:
    out += [(at, at + len(text))] if special else []
    at += len(text)
  return out


class RecipeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if recipe is None:
      self.skipTest('deepseek-recipe is not installed')

  @parameterized.product(name=tuple(MODELS), talk=tuple(talks.TALKS))
  def test_text_marks_and_ids_are_deepseeks(self, name, talk):
    self.check(name, *talks.TALKS[talk])

  @parameterized.parameters(*MODELS)
  def test_random_conversations_too(self, name):
    rng = random.Random(0)
    for _ in range(150):
      messages, options = talks.drawn(rng)
      with self.subTest(json.dumps([messages, options], ensure_ascii=False)):
        self.check(name, messages, options)

  def check(self, name, messages, options):
    encoding, conversation = theirs(name, messages, options)
    want = encoding.render_conversation(conversation)
    got = formats.get(name).render(messages, **options)
    self.assertEqual(formats.text_of(got), want.prompt)
    self.assertEqual(ranges(got), list(want.special_ranges))
    text = talks.marked_tokenizer()
    encoding = encoding.with_tokenizer(recipe.Tokenizer.from_str(text))
    ids = formats.encode(talks.tokenizer(), got)
    self.assertEqual(ids, encoding.encode(conversation))

  def test_what_v41_drops_is_named(self):
    messages = [talks.reminder('a'), talks.system(''), talks.reminder('b')]
    encoding, conversation = theirs('v41', messages, {})
    text = encoding.render_conversation(conversation).prompt
    self.assertNotIn('<｜latest_reminder｜>b', text)
    with self.assertRaisesRegex(InputError, 'two of role latest_reminder'):
      formats.get('v41').render(messages)
    formats.get('v4').render(messages)

  @parameterized.parameters(
    ([{'role': 'user', 'content': None}],),
    ([talks.user('u'), talks.assistant('x', prefix=True), talks.user('v')],),
    ([talks.user('u'), talks.tool('x')],),
    ([talks.user('u'), talks.assistant('', None, talks.call('{}'))] * 2,),
    ([talks.user('u'), talks.assistant(None), talks.user('v')],),
    ([{'role': 'robot', 'content': 'x'}],),
    ([{'role': 'user', 'content': [{'type': 'image_url'}]}],),
  )
  def test_both_refuse(self, messages):
    for name in MODELS:
      with self.assertRaises((recipe.ConversionError, ValueError)):
        encoding, conversation = theirs(name, messages, {})
        encoding.render_conversation(conversation)
      with self.assertRaises(InputError):
        formats.get(name).render(messages)


if __name__ == '__main__':
  absltest.main()
