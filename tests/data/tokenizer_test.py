import collections
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from deepseek_jax.data import corpus, tokenizer
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.errors import InputError

VOCAB = 600


def texts():
  """The json and email packages: enough code and prose for a small BPE."""
  docs = corpus.documents('stdlib')
  return [d.text for d in docs if d.name.startswith(('json/', 'email/'))]


@functools.cache
def bpe():
  return train_bpe(texts(), VOCAB)


def make(kind):
  return bpe() if kind == 'bpe' else tokenizer.ByteTokenizer()


def any_text(rng, length):
  """Random characters from the ends of Unicode, and runs of blanks."""
  ranges = [(0, 0x80), (0, 0x300), (0x300, 0xD800), (0xE000, 0x110000)]
  blanks = ['    ', '\t\t', '\r\n', '\n\n\n', ' \n', '12345678', "it's"]
  parts = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(length)]
  return ''.join(part + rng.choice(['', *blanks]) for part in parts)


BOTH = parameterized.parameters('bpe', 'bytes')


class TokenizerTest(parameterized.TestCase):
  def folder(self):
    return self.enterContext(tempfile.TemporaryDirectory())

  @BOTH
  def test_any_text_comes_back_exactly(self, kind):
    tok, rng = make(kind), random.Random(0)
    for text in ['', ' ', *texts(), *(any_text(rng, 40) for _ in range(100))]:
      self.assertEqual(tok.decode(tok.encode(text)), text)

  @BOTH
  def test_a_batch_is_encoded_as_one_by_one(self, kind):
    tok = make(kind)
    batch = ['', *texts()]
    expected = [tok.encode(text) for text in batch]
    self.assertEqual(list(map(list, tok.encode_batch(batch))), expected)

  @BOTH
  def test_special_tokens_in_text_stay_text(self, kind):
    tok = make(kind)
    special = {tok.pad_id, tok.eos_id, *tok.fim}
    self.assertEqual(special, set(range(5)))
    text = 'a<|eos|>b<|fim_begin|><|fim_hole|><|fim_end|><|pad|>'
    for ids in (tok.encode(text), *tok.encode_batch([text])):
      self.assertNoCommonElements(special, ids)
      self.assertEqual(tok.decode(ids), text)
    asked = tok.encode(text, special=True)
    self.assertEqual([i for i in asked if i in special], [1, 2, 3, 4, 0])
    self.assertEqual(tok.decode(asked), text)

  def test_bytes_are_the_bytes(self):
    tok = tokenizer.ByteTokenizer()
    self.assertEqual(tok.encode('é\n'), [5 + 0xC3, 5 + 0xA9, 5 + 10])
    self.assertEqual(tok.vocab_size, 261)
    self.assertEqual(tok.decode([5 + 0xC3, 1]), '�<|eos|>')
    self.assertEqual(tok.decode([5 + 65, 261, 4000]), 'A')

  def test_bpe_vocabulary_is_exact_and_used(self):
    tok = bpe()
    self.assertEqual(tok.vocab_size, VOCAB)
    counts = collections.Counter(
      i for text in texts() for i in tok.encode(text)
    )
    self.assertLess(max(counts), VOCAB)
    # Each merge was frequent in the training text; most tokens remain so.
    self.assertGreater(len(counts), 0.7 * VOCAB)
    size = sum(len(text.encode()) for text in texts())
    self.assertGreater(size / counts.total(), 2)
    self.assertEqual(tok.decode([65, VOCAB, 4000]), tok.decode([65]))

  def test_bpe_splits_suit_code(self):
    tok = bpe()
    split = lambda text: [tok.decode([i]) for i in tok.encode(text)]
    self.assertEqual(split('\n        return'), ['\n', '       ', ' return'])
    self.assertEqual(split(' self'), [' self'])

  def test_bpe_reads_digits_in_threes_however_frequent_a_number_is(self):
    tok = train_bpe(['12345678\n' * 100], 266)
    parts = [tok.decode([i]) for i in tok.encode('12345678')]
    self.assertEqual(parts, ['123', '456', '78'])

  def test_bpe_is_a_function_of_its_texts(self):
    tok = train_bpe(texts(), VOCAB)
    self.assertEqual(tok.sha256, bpe().sha256)
    other = train_bpe([*texts(), 'zq' * 5000], VOCAB)
    self.assertNotEqual(other.sha256, bpe().sha256)
    # Another process hashes strings with another seed, on another thread count.
    code = (
      'from deepseek_jax.data import corpus, train_bpe;'
      'docs = corpus.documents("stdlib");'
      't = [d.text for d in docs if d.name.startswith(("json/", "email/"))];'
      f'print(train_bpe(t, {VOCAB}).sha256)'
    )
    env = os.environ | {'RAYON_NUM_THREADS': '1', 'PYTHONHASHSEED': '7'}
    out = subprocess.check_output([sys.executable, '-c', code], env=env)
    self.assertEqual(out.decode().strip(), tok.sha256)

  @parameterized.parameters(
    (260, 'vocab_size=260.* at least 261'),
    (5000, 'vocab_size=5000.* only 2.. tokens'),
  )
  def test_a_vocabulary_that_cannot_be_filled_is_refused(self, size, message):
    with self.assertRaisesRegex(InputError, message):
      train_bpe(['abc abd'], size)

  @BOTH
  def test_saved_and_loaded_is_the_same(self, kind):
    tok, folder = make(kind), self.folder()
    tok.save(folder)
    for path in (folder, os.path.join(folder, 'tokenizer.json')):
      again = tokenizer.from_file(path)
      self.assertEqual(again.kind, kind)
      for name in ('sha256', 'vocab_size', 'eos_id', 'pad_id', 'fim'):
        self.assertEqual(getattr(again, name), getattr(tok, name))
      self.assertEqual(again.encode(texts()[0]), tok.encode(texts()[0]))


class FromFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())
    bpe().save(self.root)

  def edit(self, change, name='tokenizer.json'):
    path = os.path.join(self.root, name)
    with open(path, encoding='utf-8') as file:
      spec = json.load(file)
    change(spec)
    with open(path, 'w', encoding='utf-8') as file:
      json.dump(spec, file)
    return tokenizer.from_file(self.root)

  def add(self, *names, special):
    base = dict.fromkeys(
      ['single_word', 'lstrip', 'rstrip', 'normalized'], False
    )
    added = [
      base | {'id': VOCAB + n, 'content': name, 'special': special}
      for n, name in enumerate(names)
    ]
    return self.edit(lambda spec: spec['added_tokens'].extend(added))

  def test_marks_that_the_file_calls_plain_are_not_read_from_text(self):
    tok = self.add('<think>', special=False)
    self.assertEqual(tok.vocab_size, VOCAB + 1)
    self.assertNotIn(VOCAB, tok.encode('a <think> b'))
    self.assertEqual(tok.encode('<think>', special=True), [VOCAB])
    self.assertEqual(tok.decode([VOCAB]), '<think>')

  def test_added_runs_of_spaces_stay_in_use_with_their_ids(self):
    tok = self.add('<x>', ' ' * 20, special=False)
    ids = tok.encode('a' + ' ' * 20 + 'b')
    self.assertIn(VOCAB + 1, ids)
    self.assertEqual(tok.decode(ids), 'a' + ' ' * 20 + 'b')

  def test_the_vocabulary_reaches_to_the_largest_id(self):
    def move(spec):
      vocab = spec['model']['vocab']
      vocab[max(vocab, key=vocab.get)] = 4000

    self.assertEqual(self.edit(move).vocab_size, 4001)

  def test_length_limits_and_templates_in_the_file_have_no_effect(self):
    limit = {
      'direction': 'Right',
      'max_length': 4,
      'strategy': 'LongestFirst',
      'stride': 0,
    }
    tok = self.edit(lambda spec: spec.update(truncation=limit))
    self.assertEqual(tok.encode(texts()[0]), bpe().encode(texts()[0]))
    self.assertEqual(tok.encode_batch(texts()[:1])[0], tok.encode(texts()[0]))

  def test_eos_and_pad_follow_the_config_file(self):
    def change(config):
      config['eos_token'] = {'content': '<|fim_end|>'}
      config['pad_token'] = None

    tok = self.edit(change, 'tokenizer_config.json')
    self.assertEqual((tok.eos_id, tok.pad_id), (4, 0))
    self.assertNotEqual(tok.sha256, bpe().sha256)
    os.remove(os.path.join(self.root, 'tokenizer_config.json'))
    self.assertEqual(tokenizer.from_file(self.root).eos_id, 1)

  def test_names_of_published_fim_tokens_are_known(self):
    published = ('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>')

    def rename(spec):
      for i, name in enumerate(published, 2):
        spec['added_tokens'][i]['content'] = name
        spec['model']['vocab'][name] = i
        del spec['model']['vocab'][tokenizer.SPECIAL[i]]

    self.assertEqual(self.edit(rename).fim, (2, 3, 4))

  @parameterized.parameters(
    ({'added_tokens': []}, 'no end-of-text token'),
    ({'normalizer': {'type': 'Lowercase'}}, 'changes text when it decodes'),
    ({'model': {'type': 'Nonsense'}}, 'is not a tokenizer.json'),
    ({'model': None}, 'is not a tokenizer.json'),
    ({'added_tokens': [{}]}, 'is not a tokenizer.json'),
  )
  def test_an_unfit_file_is_refused(self, change, message):
    with self.assertRaises(InputError) as caught:
      self.edit(lambda spec: spec.update(change))
    self.assertIn(message, str(caught.exception))
    self.assertIn('data.tokenizer', str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(
    (b'{', 'is not JSON'),
    (b'[]', 'holds no JSON object'),
    (b'\xff', 'cannot read'),
    (None, 'cannot read'),
  )
  def test_a_broken_file_is_refused(self, content, message):
    path = os.path.join(self.root, 'tokenizer.json')
    os.remove(path)
    if content is not None:
      with open(path, 'wb') as file:
        file.write(content)
    with self.assertRaisesRegex(
      InputError, f'{re.escape(path)}.*{message}|{message}.*{re.escape(path)}'
    ):
      tokenizer.from_file(path)


if __name__ == '__main__':
  absltest.main()
