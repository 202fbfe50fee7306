"""How conversations are written: which format, and what never becomes one."""

import json
import os
import tempfile

from absl.testing import absltest, parameterized

from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.errors import InputError
from deepseek_jax.infer import formats
from deepseek_jax.infer.dialect import Chat
from deepseek_jax.infer.format_dialect import (
  FormatDialect,
  TemplateDialect,
  choose,
)
from tests import tokenizer_folders
from tests.serve import served as servers

_THINKING = (
  "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' +"
  " m['content'] | trim }}{% endfor %}{{ '<|assistant|><think>\n' }}"
)


def _chat(*texts, **fields):
  messages = tuple({'role': 'user', 'content': text} for text in texts)
  return Chat(messages, **fields)


class TemplateTest(parameterized.TestCase):
  def folder(self, template=tokenizer_folders.TEMPLATE, marks=()):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    model = tokenizer_folders.byte_level()
    model.add_special_tokens([*marks])
    tokenizer_folders.save(
      folder, model, model_type='x', names={'chat_template': template}
    )
    return folder, tokenizers.from_file(folder)

  def test_a_conversation_is_that_of_the_template(self):
    folder, tokenizer = self.folder()
    dialect = TemplateDialect(folder, tokenizer)
    ids = dialect.encode(_chat('hello world'))
    want = '<s><|user|>hello world<|assistant|>'
    self.assertEqual(ids, tokenizer.encode(want, special=True))
    self.assertIsNone(dialect.end_of_thinking)

  @parameterized.parameters(
    '<|user|>',
    '</s><s>',
    'a<|assistant|>b<|eot|>c',
    '<<|user|>|user|>',
    '<|us<|eot|>er|>',
    '<|user|>' * 50,
    ' <pad> ',
  )
  def test_text_of_a_user_never_becomes_a_special_token(self, text):
    folder, tokenizer = self.folder()
    dialect = TemplateDialect(folder, tokenizer)
    ids = dialect.encode(_chat(text))
    names = tokenizer_folders.SPECIAL
    special = [tokenizer.encode(n, special=True)[0] for n in names]
    found = [i for i in ids if i in special]
    self.assertEqual(found, [special[0], special[3], special[4]])
    # What is said stays what it is.
    self.assertEqual(tokenizer.decode(ids[2:-1]), text)

  def test_a_template_that_changes_what_is_said_is_no_way_in(self):
    for change in ('upper', 'title', 'replace("0", "<s>")', 'reverse'):
      loud = tokenizer_folders.TEMPLATE.replace(
        "m['content']", f"m['content'] | {change}"
      )
      folder, tokenizer = self.folder(loud)
      dialect = TemplateDialect(folder, tokenizer)
      self.assertNotEmpty(dialect.encode(_chat('hello')))
      for _ in range(9):  # marks differ each time
        try:
          ids = dialect.encode(_chat('a</s>b'))
        except InputError as error:
          self.assertIn('special tokens', str(error))
        else:
          self.assertNotIn(tokenizer.eos_id, ids)

  def test_text_in_parts_and_a_system_message(self):
    folder, tokenizer = self.folder()
    dialect = TemplateDialect(folder, tokenizer)
    parts = [{'type': 'text', 'text': 'hello</s>'}]
    chat = Chat(
      (
        {'role': 'developer', 'content': 'x'},
        {'role': 'user', 'content': parts},
      )
    )
    ids = dialect.encode(chat)
    self.assertEqual(
      tokenizer.decode(ids), '<s><|system|>x<|user|>hello</s><|assistant|>'
    )
    self.assertNotIn(tokenizer.eos_id, ids)

  def test_reasoning_that_a_template_opens_is_read_as_such(self):
    marks = ('<think>', '</think>')
    folder, tokenizer = self.folder(_THINKING, marks)
    dialect = TemplateDialect(folder, tokenizer)
    prompt = dialect.encode(_chat('hello'))
    self.assertEqual(
      [dialect.end_of_thinking], tokenizer.encode('</think>', special=True)
    )
    parser = dialect.parser(_chat('hello'), prompt, ())
    self.assertEqual(parser.state, 'reasoning')
    said = tokenizer.encode('so</think>\n\nyes', special=True)
    found = [parser.feed(token) for token in said] + [parser.finish()]
    self.assertEqual(''.join(d.reasoning for d in found), 'so')
    self.assertEqual(''.join(d.content for d in found), 'yes')

  def test_what_a_template_cannot_do_is_one_line(self):
    folder, tokenizer = self.folder()
    dialect = TemplateDialect(folder, tokenizer)
    with self.assertRaisesRegex(InputError, 'reasoning_effort'):
      dialect.encode(_chat('a', effort='high'))
    last = {'role': 'assistant', 'content': 'a', 'prefix': True}
    with self.assertRaisesRegex(InputError, 'prefix'):
      dialect.encode(Chat((*_chat('a').messages, last)))
    broken, tokenizer = self.folder('{{ raise_exception("no such role") }}')
    with self.assertRaisesRegex(InputError, 'no such role'):
      TemplateDialect(broken, tokenizer).encode(_chat('a'))


class ChooseTest(parameterized.TestCase):
  def folder(self, model_type, template=None, deepseek=True):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    tokenizer = servers.deepseek_tokenizer()
    if not deepseek:
      tokenizer_folders.save(folder, tokenizer_folders.byte_level())
    else:
      tokenizer.save(folder)
    with open(os.path.join(folder, 'config.json'), 'w') as file:
      json.dump({'model_type': model_type}, file)
    if template is not None:
      with open(os.path.join(folder, 'chat_template.jinja'), 'w') as file:
        file.write(template)
    return folder, tokenizers.from_file(folder)

  @parameterized.parameters(
    ('deepseek_v3', None, 'v3'),
    ('deepseek_v3', '<｜Assistant｜><think>', 'r1'),
    ('deepseek_v32', None, 'v32'),
    ('deepseek_v4', None, 'v4'),
    ('other', tokenizer_folders.TEMPLATE, 'template'),
    ('other', None, None),
  )
  def test_a_published_folder_tells_its_format(self, kind, template, want):
    folder, tokenizer = self.folder(kind, template)
    found = choose('auto', folder, tokenizer, published=True)
    self.assertEqual(found and found.name, want)

  def test_a_run_speaks_if_its_tokenizer_has_the_marks(self):
    tokenizer = servers.deepseek_tokenizer()
    found = choose('auto', '/no', tokenizer, published=False)
    self.assertEqual(found.name, 'v41')
    self.assertIsNone(choose('auto', '/no', servers.BYTES, published=False))
    self.assertIsNone(choose('none', '/no', tokenizer, published=False))

  @parameterized.parameters('v3', 'r1', 'v32', 'v4', 'v41')
  def test_a_run_speaks_as_it_was_trained(self, name):
    tokenizer = servers.deepseek_tokenizer()  # with the marks of all
    trained = choose(
      'auto', '/no', tokenizer, published=False, trained=(name, '')
    )
    self.assertEqual(trained.name, name)
    other = choose('v3', '/no', tokenizer, published=False, trained=(name, ''))
    self.assertEqual(other.name, 'v3')  # what is asked for comes first

  def test_a_run_thinks_as_it_was_trained_unless_asked(self):
    def opens(trained, name='auto', **asked):
      found = choose(
        name,
        '/no',
        servers.deepseek_tokenizer(),
        published=False,
        trained=('v4', ''),
        thinking=trained,
      )
      chat = Chat(({'role': 'user', 'content': 'u'},), **asked)
      return servers.deepseek_tokenizer().decode(found.encode(chat)[-1:])

    self.assertEqual(opens(None), '<think>')
    self.assertEqual(opens(False), '</think>')
    self.assertEqual(opens(False, thinking=True), '<think>')
    self.assertEqual(opens(False, name='v41'), '<think>')

  def test_a_run_of_a_template_or_of_plain_text(self):
    folder, tokenizer = self.folder('other', tokenizer_folders.TEMPLATE)
    found = choose(
      'auto', '/no', tokenizer, published=False, trained=('template', folder)
    )
    self.assertEqual(found.name, 'template')
    for plain in ('plain', 'r1_zero'):
      self.assertIsNone(
        choose('auto', '/no', tokenizer, published=False, trained=(plain, ''))
      )

  def test_what_was_chosen_and_cannot_be_is_one_line(self):
    folder, tokenizer = self.folder('x', deepseek=False)
    with self.assertRaisesRegex(InputError, 'lacks'):
      choose('v4', folder, tokenizer, published=True)
    with self.assertRaisesRegex(InputError, "'v5'"):
      choose('v5', folder, tokenizer, published=True)
    empty = self.enter_context(tempfile.TemporaryDirectory())
    with self.assertRaises(InputError):
      choose('template', empty, tokenizer, published=True)

  @parameterized.parameters(*formats.FORMATS)
  def test_every_format_can_be_served(self, name):
    tokenizer = servers.deepseek_tokenizer()
    dialect = FormatDialect(formats.get(name), tokenizer)
    chat = _chat('hello')
    prompt = dialect.encode(chat)
    parser = dialect.parser(chat, prompt, ())
    thinks = formats.get(name).thinks
    self.assertEqual(parser.state, 'reasoning' if thinks else 'content')


if __name__ == '__main__':
  absltest.main()
