"""Checks that bits per byte count no bytes that no token means."""

import json
import tempfile
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import say
from deepseek_jax.data import from_file
from deepseek_jax.evaluation import heldout_bits


class HeldoutBitsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def tokenizer(self, normalizer):
    """A byte-level tokenizer that normalises text first."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    ids = {c: i for i, c in enumerate(['<|eos|>', *sorted(alphabet)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    made.add_special_tokens(['<|eos|>'])
    made.normalizer = normalizer
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(self.folder / 'tokenizer.json'))
    return from_file(str(self.folder))

  def of_text(self, text, normalizer=None):
    path = self.folder / 'text'
    path.mkdir(exist_ok=True)
    (path / 'a.txt').write_text(text)
    tokenizer = self.tokenizer(normalizer)
    source = SimpleNamespace(config=None, tokenizer=tokenizer)
    return heldout_bits.of_text(source, str(path), 8)

  def test_tokens_that_do_not_mean_the_text_are_refused(self):
    nfc = tokenizers.normalizers.NFC()
    self.assertEqual(self.of_text('caf\u00e9', nfc).tokens, 6)
    message = r'^--text=.*: the tokenizer does not give a.txt back exactly'
    with self.assertRaisesRegex(ds.InputError, message):
      self.of_text('cafe\u0301', nfc)
    self.assertEqual(self.of_text('cafe\u0301').bytes, 6)

  def test_text_that_is_not_read_is_named(self):
    lines = [{'text': 'a'}, {'text': 'b'}, {'text': None}]
    (self.folder / 'text').mkdir()
    path = self.folder / 'text' / 'b.jsonl'
    path.write_text('\n'.join(map(json.dumps, lines)))
    with unittest.mock.patch.object(say, 'warn') as said:
      self.assertEqual(self.of_text('abc').bytes, 5)
    self.assertRegex(said.call_args[0][0], r'left out 1 record.*\(b.jsonl\)')
    path.write_text('\n'.join(map(json.dumps, lines[2:] * 3)))
    with self.assertRaisesRegex(ds.InputError, '3 records have a null text'):
      self.of_text('abc')


if __name__ == '__main__':
  absltest.main()
