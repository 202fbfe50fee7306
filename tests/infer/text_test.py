import random
import tempfile

from absl.testing import absltest, parameterized
from tokenizers import decoders, pre_tokenizers

from deepseek_jax.data import decoding, tokenizer
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.infer.text import decode_stream
from tests import tokenizer_folders as folders

TEXTS = [
  '😀' * 5,
  '\ufffd' * 6,
  'a\ufffd😀\ufffdb',
  '👩‍👧‍👦🏳️‍🌈🇫🇷',
  'e\u0301 \ufb01 稀疏模型 \u00a0\u3000\u200b\ufeff',
  '\x00\x7f\u07ff\uffff\U0010ffff',
  '  hello  world\n\n\t x',
  '',
]


def loaded(test, model):
  folder = folders.save(test.enterContext(tempfile.TemporaryDirectory()), model)
  return tokenizer.from_file(folder)


def make(test, kind):
  if kind == 'bytes':
    return tokenizer.ByteTokenizer()
  if kind == 'own_bpe':
    return train_bpe(['the cat sat on the mat 😀'], 270)
  return loaded(test, getattr(folders, kind)())


class DecodeStreamTest(parameterized.TestCase):
  def check(self, tok, ids, after=()):
    text = ''.join(decode_stream(tok, ids, after))
    if after:
      want = tok.decode([*after, *ids])[len(tok.decode(after)) :]
    else:
      want = tok.decode(ids)
    self.assertEqual(text, want, msg=f'{ids} after {after}')

  @parameterized.parameters('bytes', 'own_bpe', 'byte_level', 'sentencepiece')
  def test_joined_it_is_the_decoded_text(self, kind):
    tok, rng = make(self, kind), random.Random(0)
    for text in TEXTS:
      ids = tok.encode(text)
      self.check(tok, ids)
      for cut in range(len(ids)):
        self.check(tok, ids[:cut])  # in the middle of a character, too
        self.check(tok, ids[cut:])
    for _ in range(200):  # also ids past the vocabulary, as models have
      size = rng.randrange(1, 24)
      self.check(tok, [rng.randrange(tok.vocab_size + 9) for _ in range(size)])

  @parameterized.parameters('byte_level', 'sentencepiece')
  def test_bytes_in_any_order_too(self, kind):
    tok, rng = make(self, kind), random.Random(1)
    ids = [tok.encode(text) for text in TEXTS]
    pool = [i for row in ids for i in row]
    for _ in range(200):
      self.check(tok, rng.choices(pool, k=rng.randrange(1, 30)))

  @parameterized.parameters('own_bpe', 'byte_level', 'sentencepiece')
  def test_goes_on_from_a_prompt(self, kind):
    tok = make(self, kind)
    for text in TEXTS:
      self.check(tok, tok.encode(text), after=tok.encode('the lazy'))

  def test_a_word_after_a_prompt_keeps_its_blank(self):
    tok = make(self, 'sentencepiece')
    prompt, ids = tok.encode('the'), tok.encode('h')
    self.assertEqual(''.join(decode_stream(tok, ids)), 'h')
    self.assertEqual(''.join(decode_stream(tok, ids, prompt)), ' h')

  def test_a_character_comes_as_soon_as_it_is_whole(self):
    tok = make(self, 'bytes')
    pieces = list(decode_stream(tok, tok.encode('a€🎉\ufffd')))
    self.assertEqual(pieces, ['a', '€', '🎉', '\ufffd'])
    # E2 82 begins a character that never comes: it is given up with 'b'.
    ids = [*tok.encode('€')[:2], *tok.encode('b')]
    self.assertEqual(list(decode_stream(tok, ids)), ['\ufffdb'])

  def test_a_run_of_byte_tokens_waits_for_its_end(self):
    tok = make(self, 'sentencepiece')
    ids = tok.encode('😀o')
    decoder = tok.decoder()
    pieces = [decoder.feed(i) for i in ids]
    self.assertEqual(pieces, ['', '', '', '', '', '😀o'][-len(ids) :])

  def test_text_that_a_later_token_may_change_comes_at_the_end(self):
    model = folders.byte_level()
    model.decoder = decoders.Sequence(
      [decoders.ByteLevel(), decoders.Replace('ab', 'X')]
    )
    tok = tokenizer.Tokenizer(model.to_str(), eos='</s>')
    self.check(tok, tok.encode('cabab'))


class AlphabetTest(absltest.TestCase):
  def test_is_that_of_the_tokenizers_library(self):
    found = decoding.byte_level_alphabet()
    self.assertCountEqual(found, pre_tokenizers.ByteLevel.alphabet())
    self.assertCountEqual(found.values(), range(256))
    decode = decoders.ByteLevel().decode
    for character, byte in found.items():
      self.assertEqual(
        decode([character]), bytes([byte]).decode('utf-8', 'replace')
      )


if __name__ == '__main__':
  absltest.main()
