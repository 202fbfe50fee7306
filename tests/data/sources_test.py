"""Several sources with weights, and windows that each epoch cuts anew."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import data
from deepseek_jax.cli import common
from deepseek_jax.data import batches, corpus
from deepseek_jax.errors import InputError


class SourcesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    for name, letter, count in (('many', 'a', 60), ('few.d', 'b', 9)):
      (root / name).mkdir()
      for i in range(count):
        (root / name / f'{i}.txt').write_text(letter * (40 + i % 7))
    cls.root = root
    cls.config = data.DataConfig(
      sources={str(root / 'many'): 1, str(root / 'few.d'): 3.0},
      tokenizer='bytes',
      vocab_size=261,
      seq_len=16,
      fim_rate=0.0,
      heldout_fraction=0.2,
      cache_dir=cls.enterClassContext(tempfile.TemporaryDirectory()),
    )
    cls.store = data.build(cls.config)

  def batches(self, **changes):
    return data.Batches(self.store, dataclasses.replace(self.config, **changes))

  def test_each_has_its_share_of_the_windows(self):
    stream = self.batches()
    rows = np.concatenate([stream.next(8)['tokens'] for _ in range(50)])
    a, b = (set(part.tolist()) for part in self.store.parts())
    of_b = [not set(row.tolist()) & (a - b) for row in rows]
    self.assertAlmostEqual(np.mean(of_b), 0.75, delta=0.005)
    shares = stream.shares
    self.assertAlmostEqual(shares[str(self.root / 'few.d')], 0.75, delta=0.005)
    self.assertAlmostEqual(sum(shares.values()), 1.0)

  def test_parts_are_the_documents_of_each_source(self):
    first, second = self.store.parts()
    self.assertEqual(len(first) + len(second), len(self.store.train))
    text = self.store.tokenizer().decode(second[:40].tolist())
    self.assertEqual(set(text), {'b'})

  def test_both_are_held_out_from_under_their_names(self):
    names = [doc.name for doc in self.store.heldout_documents()]
    for path in self.config.paths:
      self.assertTrue(any(n.startswith(f'{path}::') for n in names), path)

  @parameterized.parameters(0, 1, 5)
  def test_a_resumed_stream_goes_on(self, cut):
    straight, resumed = self.batches(), self.batches()
    for _ in range(cut):
      straight.next(8)
    resumed.next(24)
    resumed.set_state(json.loads(json.dumps(straight.get_state())))
    for _ in range(20):  # through several epochs of the small source
      np.testing.assert_array_equal(
        straight.next(8)['tokens'], resumed.next(8)['tokens']
      )
    self.assertEqual(straight.drawn, resumed.drawn)

  def test_processes_agree_on_rows_and_shares(self):
    single, parts = self.batches(), [self.batches() for _ in range(2)]
    for _ in range(6):
      rows = [part.next(8, i, 2)['tokens'] for i, part in enumerate(parts)]
      np.testing.assert_array_equal(
        single.next(8)['tokens'], np.concatenate(rows)
      )
    for part in parts:
      self.assertEqual(part.get_state(), single.get_state())

  def test_weights_decide_the_order_and_may_not_change(self):
    other = dict.fromkeys(self.config.paths, 1.0)
    stream = self.batches(sources=other)
    self.assertEqual(data.build(
      dataclasses.replace(self.config, sources=other)
    ).path, self.store.path)  # the same tokens  # fmt: skip
    with self.assertRaisesRegex(InputError, 'data.sources'):
      stream.set_state(self.batches().get_state())

  @parameterized.parameters(
    {'sources': {}},
    {'sources': {'a': 0}},
    {'sources': {'a': -1.0}},
    {'sources': {'a': float('nan')}},
    {'sources': {'a': True}},
    {'sources': {'': 1}},
    {'sources': {'a::b': 1}},
    {'sources': ['a']},
    {'sources': {'a': 1}, 'path': 'b'},
  )
  def test_what_is_no_source_is_named(self, **fields):
    with self.assertRaisesRegex(InputError, 'data.(sources|path)='):
      data.DataConfig(**fields)

  def test_a_source_that_is_missing_is_named(self):
    config = dataclasses.replace(self.config, sources={'/nowhere': 1})
    with self.assertRaisesRegex(InputError, '/nowhere'):
      data.build(config)

  def test_a_configuration_carries_them_through_flags_and_json(self):
    run = ds.changed(
      ds.recipes.v3_tiny(), {'data.sources': {'a.d/b.txt': 1, 'c': 2.5}}
    )
    self.assertEqual(run.data.sources, {'a.d/b.txt': 1, 'c': 2.5})
    config = common.editable(run)
    self.assertEqual(common.frozen(ds.RunConfig, config), run)
    plain = json.loads(json.dumps(ds.to_dict(run)))
    self.assertEqual(ds.from_dict(ds.RunConfig, plain), run)
    self.assertIsNone(ds.recipes.v3_tiny().data.sources)

  def test_one_path_reads_as_before(self):
    config = data.DataConfig(path=str(self.root / 'many'))
    names = [doc.name for doc in corpus.documents_of(config)]
    self.assertEqual(names, [doc.name for doc in corpus.documents(config.path)])


class CutTest(absltest.TestCase):
  def test_later_epochs_read_every_token_at_other_places(self):
    windows = batches.Windows(np.arange(1000), 16)
    first = {int(windows.at(i, 0)[0]) for i in range(len(windows))}
    for epoch in range(1, 6):
      rows = [windows.at(i, epoch) for i in range(len(windows))]
      for row in rows:
        self.assertEqual(row.shape, (17,))
        steps = np.diff(row) % 1000
        np.testing.assert_array_equal(steps, 1)  # round the end
      starts = {int(row[0]) for row in rows}
      self.assertLen(starts, len(windows))
    places = {int(windows.at(0, e)[0]) for e in range(40)}
    self.assertGreater(len(places), 10)
    self.assertContainsSubset(places, range(16))
    self.assertNotEmpty(first)

  def test_a_run_of_an_earlier_version_keeps_its_windows(self):
    with tempfile.TemporaryDirectory() as root:
      for i in range(9):
        (Path(root) / f'{i}.txt').write_text(f'{i}' * 50)
      config = data.DataConfig(
        path=root, tokenizer='bytes', seq_len=16, fim_rate=0.0,
        heldout_fraction=0.0, cache_dir=root + '/.cache',
      )  # fmt: skip
      store = data.build(config)
      old, new = data.Batches(store, config), data.Batches(store, config)
      state = old.get_state()
      self.assertEqual(state.pop('cut'), 'epoch')
      old.set_state(state)
      self.assertNotIn('cut', old.get_state())
      count = new.windows
      np.testing.assert_array_equal(
        old.next(count)['tokens'], new.next(count)['tokens']
      )
      self.assertFalse(
        np.array_equal(old.next(count)['tokens'], new.next(count)['tokens'])
      )


if __name__ == '__main__':
  absltest.main()
