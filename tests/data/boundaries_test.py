import itertools
import json
import os
import tempfile

from absl.testing import absltest, parameterized
from tokenizers import processors

from deepseek_jax.data import boundaries, tokenizer
from deepseek_jax.errors import InputError
from tests import tokenizer_folders as folders

_EOT = {'content': '<|eot|>', 'special': True, 'normalized': False}
_ADDED = {'__type': 'AddedToken'}
_ROBERTA = processors.RobertaProcessing(('</s>', 1), ('<s>', 0))


def read(folder):
  tok = tokenizer.from_file(folder)
  return tok, boundaries.boundaries(folder, tok)


def theirs(folder):
  import transformers

  return transformers.AutoTokenizer.from_pretrained(folder)


class BeginsTest(parameterized.TestCase):
  def folder(self, *args, **kwargs):
    return folders.save(
      self.enterContext(tempfile.TemporaryDirectory()), *args, **kwargs
    )

  def same_as_transformers(self, folder, texts):
    tok, around = read(folder)
    other = theirs(folder)
    for text in texts:
      ids = around.around(tok.encode(text, special=True))
      self.assertEqual(ids, other(text)['input_ids'], msg=repr(text))
    return around

  @parameterized.parameters(
    *itertools.product(
      ['byte_level', 'sentencepiece'],
      [None, folders.BOS, folders.BOTH, _ROBERTA],
      [{}, {'add_bos_token': True}, {'add_bos_token': False}],
    )
  )
  def test_ids_of_text_equal_transformers(self, kind, post, flags):
    folder = self.folder(
      getattr(folders, kind)(post),
      model_type='llama',
      names={'tokenizer_class': 'PreTrainedTokenizerFast', **flags},
    )
    texts = ['hello world', '', ' x', 'a <|user|>b</s> <pad>c', '😀 é\ufffd']
    around = self.same_as_transformers(folder, texts)
    begins = () if post is None else (0,)
    closes = (1,) if post in (folders.BOTH, _ROBERTA) else ()
    self.assertEqual((around.begins, around.closes), (begins, closes))

  @parameterized.parameters('LlamaTokenizerFast', 'LlamaTokenizer')
  def test_a_llama_class_over_byte_level_is_read_by_its_file(self, name):
    config = {'tokenizer_class': name, 'add_bos_token': True}
    for post, begins in ((folders.BOS, (0,)), (None, ())):
      folder = self.folder(folders.byte_level(post), names=config)
      around = self.same_as_transformers(folder, ['hello world', 'x'])
      self.assertEqual(around.begins, begins)

  def test_what_is_not_followed_is_said(self):
    post = processors.ByteLevel(trim_offsets=False)
    for flag, model, words in (
      (True, folders.byte_level(post), 'add_bos_token = true'),
      (False, folders.byte_level(folders.BOS), 'add_bos_token = false'),
    ):
      config = {'add_bos_token': flag}
      _, around = read(self.folder(model, names=config))
      self.assertLen(around.notes, 1)
      self.assertIn(words, around.notes[0])
      config = {'add_bos_token': not flag}
      _, around = read(self.folder(model, names=config))
      self.assertEqual(around.notes, ())

  def test_a_prompt_that_spells_the_beginning_gets_no_second(self):
    tok, around = read(self.folder(folders.byte_level(folders.BOS)))
    ids = around.around(tok.encode('<s>hello', special=True))
    self.assertEqual(ids[0], 0)
    self.assertEqual(ids, around.around(ids))
    self.assertNotEqual(ids[1], 0)
    self.assertEqual(around.around([]), [0])

  def test_tokens_beside_the_file_are_read_in_prompts_and_not_in_text(self):
    config = {
      'added_tokens_decoder': {'330': {**_EOT, 'content': '<|x|>'}},
      'custom_token': '<|own|>',
    }
    folder = self.folder(folders.byte_level(), names=config)
    texts = ['a<|x|> b', '<|own|>', ' <|own|> <|x|>', '<s><|x|></s>']
    self.same_as_transformers(folder, texts)
    tok = tokenizer.from_file(folder)
    for text in texts:
      self.assertLess(max(tok.encode(text)), 330)
      self.assertEqual(tok.decode(tok.encode(text)), text)

  @parameterized.parameters(
    {'extra_special_tokens': ['<|x|>']},
    {'additional_special_tokens': ['<|x|>', '<|user|>']},
    {'extra_special_tokens': {'image_token': '<|x|>'}},
    {
      'mask_token': {'__type': 'AddedToken', 'content': '<|x|>', 'lstrip': True}
    },
  )
  def test_special_tokens_without_a_name_are_read(self, **names):
    folder = self.folder(folders.byte_level(), names=names)
    self.same_as_transformers(folder, ['a <|x|> b', '<|user|><|x|>'])

  def test_older_folders_name_tokens_in_a_map(self):
    folder = self.folder(
      folders.byte_level(),
      names={'eos_token': None, 'bos_token': None},
      special_tokens_map={'eos_token': _EOT, 'bos_token': '<s>'},
      added_tokens={'<|extra|>': 330},
    )
    self.same_as_transformers(folder, ['a<|extra|>b', '<|eot|>'])
    tok, around = read(folder)
    self.assertEqual((tok.eos_id, tok.bos_id, around.ends), (5, 0, (5,)))
    self.assertEqual(theirs(folder).eos_token_id, 5)


class EndsTest(parameterized.TestCase):
  def folder(self, config, generation, names=()):
    files = {'config': {'model_type': 'llama', **config}}
    if generation is not None:
      files['generation_config'] = generation
    return folders.save(
      self.enterContext(tempfile.TemporaryDirectory()),
      folders.byte_level(),
      names=names,
      **files,
    )

  @parameterized.parameters(
    ({}, None, (1,)),
    ({'eos_token_id': 1}, {'eos_token_id': [1, 5]}, (1, 5)),
    ({'eos_token_id': [1, 4, 5]}, None, (1, 4, 5)),
    ({'eos_token_id': 7}, {'eos_token_id': 5}, (1, 7, 5)),
    ({'eos_token_id': None}, {}, (1,)),
    ({'eos_token_id': []}, {'eos_token_id': [5]}, (1, 5)),
  )
  def test_every_file_is_heard(self, config, generation, want):
    _, around = read(self.folder(config, generation))
    self.assertEqual(around.ends, want)

  @parameterized.parameters(
    ('</s>',), (-1,), (True,), (1.5,), ([[1]],), ([1, None],), ({'a': 1},)
  )
  def test_what_is_no_token_is_refused(self, value):
    with self.assertRaisesRegex(InputError, 'config.json: eos_token_id'):
      read(self.folder({'eos_token_id': value}, None))
    with self.assertRaisesRegex(InputError, 'generation_config.json: eos'):
      read(self.folder({}, {'eos_token_id': value}))

  @parameterized.parameters('{', '[]', '"x"', '[' * 100000)
  def test_a_damaged_file_is_named(self, text):
    for name in ('generation_config', 'config', 'tokenizer_config'):
      folder = self.folder({}, {})
      with open(os.path.join(folder, f'{name}.json'), 'w') as file:
        file.write(text)
      with self.assertRaisesRegex(InputError, f'{name}.json'):
        read(folder)

  @parameterized.parameters(
    ([1],), ({'x': {'content': 'a'}},), ({'1': 3},), ({'1': {'a': 3}},)
  )
  def test_tokens_that_cannot_be_read_are_named(self, added):
    with self.assertRaisesRegex(InputError, 'added_tokens_decoder'):
      read(self.folder({}, {}, {'added_tokens_decoder': added}))

  def test_a_run_ends_documents_and_begins_none(self):
    around = boundaries.of_run(tokenizer.ByteTokenizer())
    self.assertEqual(around, ((), (), (1,), ()))
    self.assertEqual(around.around([7]), [7])

  def test_a_store_hands_its_config_over(self):
    folder = self.folder({'eos_token_id': 7}, None)
    os.remove(os.path.join(folder, 'config.json'))
    tok = tokenizer.from_file(folder)
    found = boundaries.boundaries(folder, tok, {'eos_token_id': [4]})
    self.assertEqual(found.ends, (1, 4))
    self.assertEqual(json.loads(json.dumps(found.ends)), [1, 4])


if __name__ == '__main__':
  absltest.main()
