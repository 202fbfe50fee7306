"""Checks what a model has to beat: guesses over tokens, compressors."""

import dataclasses
import lzma
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from absl.testing import absltest

from deepseek_jax import data
from deepseek_jax.data import baselines


class BaselinesTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    rng = np.random.default_rng(0)
    words = ['alpha', 'beta', 'gamma', 'delta', 'é']
    for i in range(40):
      text = ' '.join(rng.choice(words, 60, p=[0.6, 0.2, 0.1, 0.05, 0.05]))
      (root / f'{i}.txt').write_text(f'{i} {text}')
    config = data.DataConfig(
      path=str(root), tokenizer='bytes', vocab_size=261, seq_len=16,
      fim_rate=0.2, heldout_fraction=0.2, cache_dir=f'{root}/.cache',
    )  # fmt: skip
    cls.store = data.build(config)
    cls.heldout = data.Heldout(cls.store, 16, 4)
    cls.found = data.bits_to_beat(cls.heldout, 261)

  def _training(self):
    held = set(self.store.heldout_texts())
    everything = data.documents(self.store.index['corpus'])
    return [doc.text for doc in everything if doc.text not in held]

  def test_a_unigram_guess_is_the_entropy_of_counts(self):
    counts = Counter(np.asarray(self.store.train).tolist())
    total = sum(counts.values()) + 261
    bits = size = 0
    for doc in self.store.heldout_documents():
      ids = self.store.heldout[doc.offset : doc.offset + doc.tokens].tolist()
      bits -= sum(math.log2((counts[i] + 1) / total) for i in ids)
      size += doc.bytes
    np.testing.assert_allclose(self.found['unigram'], bits / size, rtol=1e-12)
    self.assertEqual(self.heldout.bytes, size)

  def test_a_compressor_is_charged_for_what_the_texts_add(self):
    texts = [text.encode() for text in self.store.heldout_texts()]
    train = baselines.training_text(self.store)
    pack = lambda data: len(lzma.compress(data, preset=9))
    more = pack(train + b''.join(texts)) - pack(train)
    want = 8 * more / sum(map(len, texts))
    self.assertEqual(self.found['xz primed'], want)
    self.assertLess(self.found['xz primed'], self.found['xz'])
    self.assertLess(self.found['zstd primed'], self.found['xz'])

  def test_it_reads_the_training_documents_alone(self):
    train = baselines.training_text(self.store).decode()
    for text in self._training():
      # Those in fill-in-the-middle form are there in pieces.
      pieces = [text[i : i + 20] for i in range(0, len(text) - 20, 20)]
      held = sum(piece in train for piece in pieces)
      self.assertGreater(held, 0.8 * len(pieces))
    self.assertNotIn(self.store.heldout_texts()[0][:60], train)
    short = baselines.training_text(self.store, 100)
    self.assertLessEqual(len(short), 100)
    self.assertTrue(train.encode().endswith(short))

  def test_a_part_of_the_documents_is_compared_on_its_own_bytes(self):
    some = dataclasses.replace(self.heldout, limit=2)
    found = data.bits_to_beat(some, 261)
    names = [doc.name for doc in some.documents]
    every = dict(
      zip(
        [doc.name for doc in self.store.heldout_documents()],
        self.store.heldout_texts(),
      )
    )
    texts = [every[name].encode() for name in names]
    packed = sum(len(lzma.compress(text, preset=9)) for text in texts)
    self.assertEqual(found['xz'], 8 * packed / sum(map(len, texts)))

  def test_they_are_kept_for_these_documents_alone(self):
    path = Path(self.store.path) / baselines.FILE
    data.bits_to_beat(self.heldout, 261)
    kept = path.read_text()
    path.write_text(kept.replace('"uniform": ', '"uniform": 1'))
    changed = data.bits_to_beat(self.heldout, 261)
    self.assertNotEqual(changed, self.found)  # read back
    other = data.bits_to_beat(self.heldout, 300)
    self.assertGreater(other['uniform'], self.found['uniform'])
    for damaged in ('', '{', '[]', '{"of": 1}'):
      path.write_text(damaged)
      self.assertEqual(data.bits_to_beat(self.heldout, 261), self.found)

  def test_a_unigram_beats_a_uniform_guess(self):
    self.assertEqual(list(self.found)[:3], ['uniform', 'unigram', 'xz'])
    self.assertLess(self.found['unigram'], self.found['uniform'])


if __name__ == '__main__':
  absltest.main()
