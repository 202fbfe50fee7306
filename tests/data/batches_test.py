import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile

import grain
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import data
from deepseek_jax.data import batches as pipeline
from deepseek_jax.errors import InputError

RAMP = (4, 4, 8, 12, 16, 8, 4)
EOS = 1


class PipelineTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = cls.enterClassContext(tempfile.TemporaryDirectory())
    rng = np.random.default_rng(0)
    for i in range(60):
      with open(os.path.join(root, f'{i}.txt'), 'w') as file:
        file.write(f'{i} ' + 'ab ' * int(rng.integers(20)))
    cls.config = data.DataConfig(
      path=root,
      tokenizer='bytes',
      seq_len=16,
      heldout_fraction=0.1,
      cache_dir=cls.enterClassContext(tempfile.TemporaryDirectory()),
    )
    cls.store = data.build(cls.config)

  def batches(self, **changes):
    config = dataclasses.replace(self.config, **changes)
    return data.Batches(self.store, config)

  def window(self, i, seq_len=16):
    return self.store.train[i * seq_len : i * seq_len + seq_len + 1].tolist()

  @parameterized.parameters(1, 3, 16, 50)
  def test_an_epoch_is_every_window_once_in_a_new_order(self, seq_len):
    stream = self.batches(seq_len=seq_len)
    count = stream.windows
    self.assertEqual(count, (len(self.store.train) - 1) // seq_len)
    expected = sorted(self.window(i, seq_len) for i in range(count))
    epochs = [stream.next(count)['tokens'].tolist() for _ in range(3)]
    self.assertEqual(sorted(epochs[0]), expected)
    # Later ones are cut at another place, and then as often.
    text = self.store.train.tolist()
    for epoch in epochs[1:]:
      cuts = [
        sorted(
          (text[o:] + text[:o] + text[o : o + 1])[i * seq_len :][: seq_len + 1]
          for i in range(count)
        )
        for o in range(seq_len)
      ]
      self.assertIn(sorted(epoch), cuts)
    self.assertNotEqual(epochs[0], epochs[1])
    self.assertNotEqual(epochs[1], epochs[2])
    self.assertNotEqual(epochs[0], expected)

  def test_the_seed_decides_the_order_and_seeds_share_no_epoch(self):
    count = self.batches().windows
    epochs = []
    for seed in range(3):
      stream = self.batches(seed=seed)
      epochs += [stream.next(count)['tokens'].tolist() for _ in range(3)]
    for i, epoch in enumerate(epochs):
      self.assertNotIn(epoch, epochs[:i])
    again = self.batches(seed=1).next(count)['tokens'].tolist()
    self.assertEqual(again, epochs[3])

  def test_a_resumed_run_sees_exactly_what_the_straight_run_sees(self):
    for cut in range(len(RAMP) + 1):
      straight = self.batches()
      for size in RAMP[:cut]:
        straight.next(size)
      saved = json.dumps(straight.get_state())
      resumed = self.batches()
      resumed.next(4)  # what a stream did before has no influence
      resumed.set_state(json.loads(saved))
      for size in (*RAMP[cut:], 200):  # 200: past the end of an epoch
        expected, found = straight.next(size), resumed.next(size)
        self.assertEqual(expected.keys(), found.keys())
        for name, value in expected.items():
          np.testing.assert_array_equal(found[name], value)

  def test_the_order_survives_a_new_process(self):
    code = (
      'import json, pickle, sys; from deepseek_jax import data;'
      'config, state = pickle.loads(sys.stdin.buffer.read());'
      'stream = data.Batches(data.build(config), config);'
      'stream.set_state(state); print(stream.next(8)["tokens"].tolist())'
    )
    stream = self.batches()
    stream.next(12)
    sent = pickle.dumps((self.config, stream.get_state()))
    out = subprocess.check_output([sys.executable, '-c', code], input=sent)
    self.assertEqual(json.loads(out), stream.next(8)['tokens'].tolist())

  @parameterized.parameters(2, 4)
  def test_the_global_batch_is_the_same_on_any_process_count(self, count):
    single = self.batches()
    parts = [self.batches() for _ in range(count)]
    for size in RAMP:
      expected = single.next(size)
      rows = [part.next(size, i, count) for i, part in enumerate(parts)]
      for name, value in expected.items():
        joined = np.concatenate([row[name] for row in rows])
        np.testing.assert_array_equal(joined, value)
      for part in parts:
        self.assertEqual(part.get_state(), single.get_state())

  def test_a_ramp_of_batch_sizes_reads_one_stream(self):
    ramp, steady = self.batches(), self.batches()
    joined = np.concatenate([ramp.next(size)['tokens'] for size in RAMP])
    np.testing.assert_array_equal(steady.next(sum(RAMP))['tokens'], joined)

  def test_batches_are_int32_of_the_stated_shape(self):
    batch = self.batches(cross_document=False).next(8, 1, 2)
    self.assertEqual(set(batch), {'tokens', 'segments', 'positions'})
    for value in batch.values():
      self.assertEqual((value.shape, value.dtype), ((4, 17), np.int32))
      self.assertIs(type(value), np.ndarray)

  def test_one_segment_if_documents_may_attend_to_each_other(self):
    batch = self.batches(cross_document=True).next(32)
    self.assertEqual(set(batch), {'tokens'})

  def test_segments_follow_the_documents_else(self):
    together = self.batches(cross_document=True).next(32)['tokens']
    batch = self.batches(cross_document=False).next(32)
    np.testing.assert_array_equal(batch['tokens'], together)
    self.assertGreater(batch['segments'].max(), 1)
    for row in range(32):
      self.check_segments(*(batch[name][row] for name in sorted(batch)))

  def test_segments_of_any_tokens_by_brute_force(self):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
      tokens = np.where(rng.random((20, 23)) < share, EOS, 7)
      segments, positions = pipeline.segment(tokens, EOS)
      for row in zip(positions, segments, tokens):
        self.check_segments(*row)

  def check_segments(self, positions, segments, tokens):
    segment, position = 1, 0
    for t, token in enumerate(tokens):
      self.assertEqual((segments[t], positions[t]), (segment, position))
      position += 1
      if token == EOS:
        segment, position = segment + 1, 0

  def test_the_state_is_small_and_of_constant_size(self):
    stream = self.batches()
    sizes = set()
    for _ in range(5):
      stream.next(16)
      state = stream.get_state()
      sizes.add(len(json.dumps(state | {'next_index': 0})))
    self.assertLen(sizes, 1)
    self.assertLess(sizes.pop(), 400)
    self.assertEqual(state['next_index'], 80)

  @parameterized.parameters(
    {'seed': 1}, {'seq_len': 8}, {'cross_document': False}
  )
  def test_a_state_of_another_setting_is_refused_by_name(self, **change):
    state = self.batches(**change).get_state()
    (name,) = change
    with self.assertRaisesRegex(InputError, f'data.{name}='):
      self.batches().set_state(state)

  def test_a_state_of_another_corpus_is_refused(self):
    config = dataclasses.replace(self.config, heldout_fraction=0.2)
    state = data.Batches(data.build(config), config).get_state()
    with self.assertRaisesRegex(InputError, 'data.path: the token'):
      self.batches().set_state(state)

  def test_a_state_without_the_hash_of_the_held_out_text_is_taken(self):
    state = self.batches().get_state()
    with self.assertRaisesRegex(InputError, 'heldout_sha256'):
      self.batches().set_state(state | {'heldout_sha256': '0'})
    del state['heldout_sha256']
    self.batches().set_state(state)

  @parameterized.parameters(-1, 1.5, None, True, '3')
  def test_a_damaged_state_is_refused(self, index):
    stream = self.batches()
    with self.assertRaisesRegex(InputError, 'next_index'):
      stream.set_state(stream.get_state() | {'next_index': index})
    with self.assertRaises(InputError):
      stream.set_state({})

  def test_a_window_longer_than_the_text_is_refused(self):
    fits = len(self.store.train) - 1
    self.assertEqual(self.batches(seq_len=fits).windows, 1)
    with self.assertRaisesRegex(InputError, f'data.seq_len={fits + 1}.*only'):
      self.batches(seq_len=fits + 1)

  @parameterized.parameters((6, 4), (0, 1), (-4, 2))
  def test_a_batch_that_processes_cannot_share_is_refused(self, size, count):
    with self.assertRaisesRegex(InputError, f'batch_size={size}'):
      self.batches().next(size, 0, count)

  @parameterized.parameters(-1, 2)
  def test_a_process_that_does_not_exist_is_refused(self, index):
    with self.assertRaisesRegex(InputError, f'process_index={index}'):
      self.batches().next(4, index, 2)

  def test_the_dataset_composes_with_grain(self):
    dataset = pipeline.dataset(self.store, self.config)
    batched = dataset.batch(4).to_iter_dataset()
    it = iter(batched)
    stream = self.batches()
    for _ in range(3):
      expected = stream.next(4)['tokens']
      np.testing.assert_array_equal(next(it)[1], expected)
    grain.experimental.assert_equal_output_after_checkpoint(
      dataset[:40].batch(4).to_iter_dataset()
    )


class ImportTest(absltest.TestCase):
  def test_importing_data_loads_none_of_the_heavy_packages(self):
    heavy = ['grain', 'tokenizers', 'pyarrow', 'torch', 'transformers']
    code = (
      'import sys, deepseek_jax.data;'
      f'print([name for name in {heavy} if name in sys.modules])'
    )
    out = subprocess.check_output([sys.executable, '-c', code])
    self.assertEqual(out.decode().strip(), '[]')


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'path': ''}, 'path'),
    ({'path': None}, 'path'),
    ({'tokenizer': ''}, 'tokenizer'),
    ({'vocab_size': 0}, 'vocab_size'),
    ({'vocab_size': 1.5}, 'vocab_size'),
    ({'seq_len': 0}, 'seq_len'),
    ({'seq_len': True}, 'seq_len'),
    ({'fim_rate': -0.1}, 'fim_rate'),
    ({'fim_rate': 1.1}, 'fim_rate'),
    ({'fim_rate': float('nan')}, 'fim_rate'),
    ({'fim_rate': '0.1'}, 'fim_rate'),
    ({'heldout_fraction': 1.0}, 'heldout_fraction'),
    ({'heldout_fraction': -1e-9}, 'heldout_fraction'),
    ({'seed': -1}, 'seed'),
    ({'seed': 2**32}, 'seed'),
  )
  def test_a_bad_field_is_refused_with_name_value_and_fix(self, change, name):
    (value,) = change.values()
    with self.assertRaises(InputError) as caught:
      data.DataConfig(**change)
    start = f'data.{name}={value!r}: set it to '
    self.assertStartsWith(str(caught.exception), start)

  def test_the_cache_follows_the_environment(self):
    with absltest.mock.patch.dict(os.environ, {'XDG_CACHE_HOME': '/x'}):
      self.assertEqual(data.DataConfig().cache(), '/x/deepseek_jax')
    home = {'XDG_CACHE_HOME': '', 'HOME': '/home/me'}
    with absltest.mock.patch.dict(os.environ, home):
      expected = '/home/me/.cache/deepseek_jax'
      self.assertEqual(data.DataConfig().cache(), expected)
      config = data.DataConfig(cache_dir='~/here')
      self.assertEqual(config.cache(), '/home/me/here')


if __name__ == '__main__':
  absltest.main()
