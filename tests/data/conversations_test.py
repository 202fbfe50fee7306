"""Conversations in three forms and two kinds of files; none lost in silence."""

import json
import os
import shutil
import tempfile

import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from deepseek_jax.data import conversations
from deepseek_jax.errors import InputError

ASKED = {'role': 'user', 'content': 'Hi'}
SAID = {'role': 'assistant', 'content': 'Hello'}
FORMS = (
  {'messages': [ASKED, SAID]},
  {
    'conversations': [
      {'from': 'human', 'value': 'Hi'},
      {'from': 'gpt', 'value': 'Hello'},
    ]
  },
  {'prompt': 'Hi', 'completion': 'Hello'},
  {'prompt': [ASKED], 'completion': [SAID]},
  {'messages': [{**ASKED, 'content': [{'type': 'text', 'text': 'Hi'}]}, SAID]},
  {'messages': json.dumps([ASKED, SAID])},
)


class ConversationsTest(parameterized.TestCase):
  def write(self, name, text):
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    path = os.path.join(folder, name)
    with open(path, 'wb') as file:
      file.write(text.encode() if isinstance(text, str) else text)
    return path

  def test_each_form_says_the_same(self):
    lines = '\n\n'.join(map(json.dumps, FORMS))
    read = list(conversations.read(self.write('a.jsonl', '\ufeff' + lines)))
    self.assertLen(read, len(FORMS))
    for found in read:
      self.assertEqual(found.messages, (ASKED, SAID))
    self.assertTrue(read[1].where.endswith('a.jsonl line 3'))

  def test_a_table_says_the_same(self):
    path = self.write('a.parquet', '')
    rows = [
      {'messages': [ASKED, {**SAID, 'reasoning_content': 'Hm'}]},
      {'messages': [ASKED, SAID]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = conversations.read(os.path.dirname(path))
    self.assertEqual(first.messages[1]['reasoning_content'], 'Hm')
    self.assertEqual(second.messages, (ASKED, SAID))
    self.assertTrue(second.where.endswith('a.parquet row 1'))

  def test_tools_and_a_system_text_stay(self):
    tools = [{'type': 'function', 'function': {'name': 'f'}}]
    record = {**FORMS[0], 'tools': json.dumps(tools)}
    self.assertEqual(
      conversations.conversation(record, 'x').tools, tuple(tools)
    )
    record = {**FORMS[1], 'system': 'Be kind'}
    first = conversations.conversation(record, 'x').messages[0]
    self.assertEqual(first, {'role': 'system', 'content': 'Be kind'})

  @parameterized.parameters(*FORMS)
  def test_a_system_text_stays_in_every_form(self, **record):
    found = conversations.conversation({**record, 'system': 'Be kind'}, 'x')
    system = {'role': 'system', 'content': 'Be kind'}
    self.assertEqual(found.messages, (system, ASKED, SAID))

  @parameterized.parameters('weight', 'train', 'loss')
  def test_a_turn_that_is_not_to_be_learnt_is_refused(self, mark):
    for form, said in (('messages', SAID), ('conversations', None)):
      said = said or {'from': 'gpt', 'value': 'Hello'}
      asked = ASKED if form == 'messages' else FORMS[1][form][0]
      record = {form: [{**asked, mark: 0}, {**said, mark: 1}]}
      found = conversations.conversation(record, 'x')
      self.assertEqual(found.messages, (ASKED, SAID))
      record[form][1][mark] = 0
      with self.assertRaisesRegex(InputError, f'^x: {mark} = 0: every turn'):
        conversations.conversation(record, 'x')

  def test_answers_of_a_prompt_are_given(self):
    record = {'prompt': [ASKED, SAID, ASKED], 'completion': [SAID]}
    found = conversations.conversation(record, 'x')
    self.assertEqual(found.messages, (ASKED, SAID) * 2)
    self.assertEqual(found.given, 1)
    with self.assertRaisesRegex(InputError, 'x: has no assistant message'):
      record = {'prompt': [ASKED, SAID], 'completion': [ASKED]}
      conversations.conversation(record, 'x')

  def test_what_stands_beside_a_text_stays(self):
    said = {'from': 'gpt', 'value': 'Hello', 'reasoning': 'Hm'}
    record = {'conversations': [FORMS[1]['conversations'][0], said]}
    found = conversations.conversation(record, 'x').messages[1]
    self.assertEqual(found, {**SAID, 'reasoning': 'Hm'})

  @parameterized.parameters(
    ('{"messages": [', 'line 1: is not JSON'),
    ('[]', 'line 1: is list, must be an object'),
    ('{"text": "a"}', "line 1: has ..text..; write 'messages'"),
    ('{"messages": [{"role": "user", "content": "Hi"}]}', 'no assistant'),
    ('{"messages": []}', 'no assistant'),
    ('{"messages": ["Hi"]}', 'must be a list of objects'),
    ('{"messages": 3}', 'must be a list of objects'),
    ('{"prompt": "Hi", "completion": null}', 'must be a list of objects'),
    (
      '{"conversations": [{"from": "narrator", "value": "Hi"}]}',
      "'from' = 'narrator'",
    ),
    (
      '{"messages": [{"role": "assistant", "content": null}]}',
      'content of assistant is NoneType',
    ),
    (
      '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
      'no valid Unicode',
    ),
    (
      '{"messages": [{"role": "assistant", "content": "a"}, {"role": "x",'
      ' "content": "b"}]}',
      "role = 'x'",
    ),
    (
      '{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}',
      'part that is no text',
    ),
  )
  def test_what_is_of_no_form_is_named(self, line, message):
    with self.assertRaisesRegex(InputError, message):
      list(conversations.read(self.write('a.jsonl', line)))

  def test_files_that_are_none_are_named(self):
    with self.assertRaisesRegex(InputError, 'does not exist'):
      list(conversations.read('/nowhere'))
    path = self.write('a.txt', 'Hi')
    for name in (path, os.path.dirname(path)):
      with self.assertRaisesRegex(InputError, 'holds no .jsonl or .parquet'):
        list(conversations.read(name))
    with self.assertRaisesRegex(InputError, 'no sound parquet'):
      list(conversations.read(self.write('a.parquet', 'PAR1')))


if __name__ == '__main__':
  absltest.main()
