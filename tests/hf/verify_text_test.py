import json
import os
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from deepseek_jax.data import boundaries, tokenizer
from deepseek_jax.hf import verify_text
from deepseek_jax.infer import chat
from tests import tokenizer_folders as folders


class CompareTest(parameterized.TestCase):
  def folder(self, model, **options):
    root = self.enterContext(tempfile.TemporaryDirectory())
    return folders.save(root, model, **options)

  @parameterized.parameters(
    ('byte_level', folders.BOS, True),
    ('byte_level', None, True),
    ('byte_level', None, False),
    ('sentencepiece', folders.BOS, True),
  )
  def test_prompts_and_chats_are_the_same_tokens(self, kind, post, begins):
    names = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    if not begins:  # a template that writes no beginning
      names['chat_template'] = folders.TEMPLATE.replace('{{ bos_token }}', '')
    model = getattr(folders, kind)(post)
    folder = self.folder(model, names=names)
    found = verify_text.compare(folder, [1])
    self.assertTrue(found['passed'], msg=found)
    self.assertEqual(found['compared'], 15)
    self.assertEqual(found['equal'], 15)
    self.assertEqual(found['begins'], [0] if post else [])
    tok = tokenizer.from_file(folder)
    text = chat.render(chat.template_config(folder), verify_text.TALKS[1])
    ids = tok.encode(text, special=True)
    self.assertEqual(ids.count(0), int(begins))  # never twice

  def test_a_prompt_without_its_beginning_fails(self):
    folder = self.folder(folders.byte_level(folders.BOS))
    bare = boundaries.Boundaries((), (), (1,))
    with mock.patch.object(boundaries, 'boundaries', return_value=bare):
      found = verify_text.compare(folder, [1])
    self.assertFalse(found['passed'])
    self.assertLess(found['equal'], found['compared'])
    self.assertIn('a', found['different'])

  def test_an_end_that_is_not_heard_fails(self):
    folder = self.folder(
      folders.byte_level(), generation_config={'eos_token_id': [1, 5]}
    )
    found = verify_text.compare(folder, [1, 5])
    self.assertTrue(found['passed'])
    self.assertEqual(found['ends'], [1, 5])
    self.assertFalse(verify_text.compare(folder, [1, 4])['passed'])

  def test_what_cannot_be_compared_is_said(self):
    folder = self.folder(folders.byte_level())
    os.remove(os.path.join(folder, 'tokenizer.json'))
    found = verify_text.compare(folder, [1])
    self.assertTrue(found['passed'])
    self.assertEqual(found['compared'], 0)
    self.assertIn('not compared: the folder has no', found['notes'][0])
    tokenizer.ByteTokenizer().save(folder)
    self.assertIn('bytes', verify_text.compare(folder, [])['notes'][0])
    json.dumps(found)


if __name__ == '__main__':
  absltest.main()
