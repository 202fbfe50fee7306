import dataclasses
import itertools
import math
import os
import shutil
import subprocess
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import data
from deepseek_jax.errors import InputError

EOS, PAD = 1, 0
SHAPES = parameterized.parameters(
  # seq_len, batch, stride
  (16, 4, None), (16, 3, 16), (16, 5, 1), (7, 2, 3), (1, 8, 1), (1000, 4, None),
)  # fmt: skip


class HeldoutTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = cls.enterClassContext(tempfile.TemporaryDirectory())
    for i in range(40):
      with open(os.path.join(root, f'{i}.txt'), 'w') as file:
        file.write('é' if i == 3 else ''.join(map(chr, range(40, 41 + 2 * i))))
    cls.config = data.DataConfig(
      path=root,
      tokenizer='bytes',
      heldout_fraction=0.5,
      cache_dir=cls.enterClassContext(tempfile.TemporaryDirectory()),
    )
    cls.store = data.build(cls.config)

  def sequences(self, held):
    """What each document is read as: EOS, its bytes, EOS."""
    ids = self.store.heldout
    cut = lambda doc: ids[doc.offset : doc.offset + doc.tokens].tolist()
    return [[EOS, *cut(doc)] for doc in held.documents]

  @SHAPES
  def test_each_token_is_predicted_once_in_order(self, seq_len, batch, stride):
    held = data.Heldout(self.store, seq_len, batch, stride)
    found = [[] for _ in held.documents]
    for rows in held:
      targets = rows['tokens'][:, 1:]
      for row, number in enumerate(rows['document']):
        chosen = targets[row][rows['weights'][row] == 1].tolist()
        if number >= 0:
          found[number] += chosen
        else:
          self.assertEmpty(chosen)
    expected = [sequence[1:] for sequence in self.sequences(held)]
    self.assertEqual(found, expected)
    self.assertEqual(held.tokens, sum(map(len, expected)))
    self.assertEqual(
      held.bytes, sum(len(t.encode()) for t in self.store.heldout_texts())
    )

  @SHAPES
  def test_a_prediction_sees_its_own_document_before_it(
    self, seq_len, batch, stride
  ):
    held = data.Heldout(self.store, seq_len, batch, stride)
    sequences = self.sequences(held)
    done = [0] * len(sequences)
    overlap = seq_len - (stride or max(seq_len // 2, 1))
    for rows in held:
      for row, number in enumerate(rows['document']):
        for t in np.flatnonzero(rows['weights'][row]):
          done[number] += 1
          at = done[number]
          context = rows['tokens'][row, : t + 1].tolist()
          expected = sequences[number][at - len(context) : at]
          self.assertEqual(context, expected)
          self.assertGreaterEqual(len(context), min(at, overlap + 1))

  @SHAPES
  def test_bits_per_byte_equal_those_of_reading_each_text_whole(
    self, seq_len, batch, stride
  ):
    # A bigram model needs one token of context, so windows must not matter.
    rng = np.random.default_rng(0)
    nll = rng.random((512, 512))
    held = data.Heldout(self.store, seq_len, batch, stride)
    total = sum(
      (
        nll[rows['tokens'][:, :-1], rows['tokens'][:, 1:]] * rows['weights']
      ).sum()
      for rows in held
    )
    tokenizer = data.ByteTokenizer()
    expected, size = 0.0, 0
    for text in self.store.heldout_texts():
      ids = [EOS, *tokenizer.encode(text), EOS]
      expected += sum(nll[a, b] for a, b in itertools.pairwise(ids))
      size += len(text.encode())
    found = held.bits_per_byte(total)
    self.assertAlmostEqual(found, expected / math.log(2) / size, delta=1e-9)

  def test_a_uniform_model_over_bytes_costs_log2_of_its_vocabulary(self):
    held = data.Heldout(self.store, 16, 4)
    # One more token than bytes in each document: the EOS that ends it.
    expected = math.log2(261) * held.tokens / held.bytes
    found = held.bits_per_byte(held.tokens * math.log(261))
    self.assertAlmostEqual(found, expected, delta=1e-12)
    self.assertEqual(held.tokens, held.bytes + len(held.documents))

  @SHAPES
  def test_shapes_are_fixed_and_padding_is_marked(self, seq_len, batch, stride):
    held = data.Heldout(self.store, seq_len, batch, stride)
    count = 0
    for rows in held:
      count += 1
      shapes = {name: value.shape for name, value in rows.items()}
      wide = (batch, seq_len + 1)
      self.assertEqual(
        shapes,
        dict.fromkeys(['tokens', 'segments', 'positions'], wide)
        | {'weights': (batch, seq_len), 'document': (batch,)},
      )
      padding = rows['segments'] == 0
      np.testing.assert_array_equal(rows['tokens'] == PAD, padding)
      np.testing.assert_array_equal(padding.all(1), rows['document'] == -1)
      self.assertEqual((rows['weights'] * padding[:, 1:]).sum(), 0)
      self.assertBetween(rows['positions'].max(), seq_len, seq_len)
      for name, value in rows.items():
        dtype = np.float32 if name == 'weights' else np.int32
        self.assertEqual(value.dtype, dtype)
    self.assertLen(held, count)

  def test_windows_of_a_long_document_are_full(self):
    held = data.Heldout(self.store, 16, 4)
    sizes = [doc.tokens for doc in held.documents]
    for rows in held:
      for row, number in enumerate(rows['document']):
        if number >= 0 and sizes[number] >= 16:
          self.assertTrue(rows['segments'][row].all())

  @parameterized.parameters(2, 4)
  def test_processes_share_each_batch(self, count):
    whole = list(data.Heldout(self.store, 16, 8))
    parts = [
      list(
        data.Heldout(self.store, 16, 8, process_index=i, process_count=count)
      )
      for i in range(count)
    ]
    for number, rows in enumerate(whole):
      for name, value in rows.items():
        joined = np.concatenate([part[number][name] for part in parts])
        np.testing.assert_array_equal(joined, value)

  def test_a_limit_draws_the_same_documents_each_time(self):
    everything = data.Heldout(self.store, 16, 4).documents
    held = data.Heldout(self.store, 16, 4, limit=5)
    self.assertLen(held.documents, 5)
    self.assertContainsSubset(held.documents, everything)
    self.assertNotEqual(held.documents, everything[:5])
    in_order = [doc for doc in everything if doc in held.documents]
    self.assertEqual(held.documents, in_order)
    more = data.Heldout(self.store, 16, 4, limit=6).documents
    self.assertContainsSubset(held.documents, more)
    numbers = {n for rows in held for n in rows['document'].tolist()} - {-1}
    self.assertEqual(numbers, set(range(5)))

  @parameterized.parameters(
    ({'stride': 0}, 'stride=0'),
    ({'stride': 17}, 'stride=17.*seq_len=16'),
    ({'limit': 0}, 'limit=0'),
    ({'batch': 0}, 'batch=0'),
    ({'batch': 6, 'process_count': 4}, 'batch=6.*4 processes'),
  )
  def test_bad_settings_are_refused(self, change, message):
    with self.assertRaisesRegex(InputError, message):
      data.Heldout(self.store, 16, **{'batch': 4} | change)

  def test_a_store_without_held_out_documents_is_refused(self):
    config = dataclasses.replace(self.config, heldout_fraction=0.0)
    with self.assertRaisesRegex(InputError, 'data.heldout_fraction'):
      data.Heldout(data.build(config), 16, 4)

  def test_a_uniform_guess_pays_for_every_token_alike(self):
    heldout = data.Heldout(self.store, 16, 4)
    tokens = sum(float(batch['weights'].sum()) for batch in heldout)
    expected = tokens * math.log2(300) / heldout.bytes
    got = data.uniform_bits_per_byte(heldout, 300)
    self.assertAlmostEqual(got, expected, places=12)

  def test_xz_is_what_the_program_gives_file_by_file(self):
    if not shutil.which('xz'):
      self.skipTest('the xz program is not installed')
    # The last is long enough for the preset to matter.
    long = [d.text for d in data.documents('stdlib') if 'json/' in d.name]
    texts = ['', 'naïve ' * 50, 'x', *self.store.heldout_texts(), *long]
    packed = [
      subprocess.check_output(['xz', '-9', '-c'], input=text.encode())
      for text in texts
    ]
    size = sum(len(text.encode()) for text in texts)
    expected = 8 * sum(map(len, packed)) / size
    self.assertEqual(data.xz_bits_per_byte(texts), expected)

  def test_xz_of_nothing_is_refused(self):
    for texts in ([], ['']):
      with self.assertRaisesRegex(InputError, 'texts'):
        data.xz_bits_per_byte(texts)


if __name__ == '__main__':
  absltest.main()
