"""A dense run becomes a sparse one: warm-up of the indexer, then all learns."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.indexer import IndexerConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.record import metrics
from deepseek_jax.run import fit as loop
from deepseek_jax.run import sources
from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.train import (
  layer_losses,
  schedules,
  warm_start,
)
from deepseek_jax.train import (
  step as train,
)
from deepseek_jax.train import (
  trainable as frozen,
)
from deepseek_jax.train.gate import GateConfig
from tests import tiny

T = 32
SPARSE = DSAConfig(
  **{f.name: getattr(tiny.MLA, f.name) for f in dataclasses.fields(tiny.MLA)},
  indexer=IndexerConfig(4, 8),
  top_k=6,
)


def model(attention):
  return ds.TransformerConfig(
    261, 16, ((('dense',), 1),), attention, FFNConfig(24), init_std=0.2
  )


def recipe(**fields):
  return train.TrainConfig(
    **{
      'tokens': T * 4 * 3,
      'batch': schedules.BatchConfig(4),
      'schedule': schedules.ScheduleConfig('constant', peak=1e-2, warmup=0),
      'gate': GateConfig(warmup=1000),
      **fields,
    }
  )


def run_config(folder, attention, source='', **fields):
  return loop.RunConfig(
    model=model(attention),
    data=datalib.DataConfig(
      path=str(folder / 'corpus'),
      tokenizer='bytes',
      vocab_size=261,
      seq_len=T,
      heldout_fraction=0.0,
      cache_dir=str(folder / 'cache'),
    ),
    train=recipe(**fields),
    init_from=str(source),
  )


def batch():
  """Sequences in which a token tells which earlier ones matter."""
  rows = np.random.default_rng(0).integers(1, 30, (4, T + 1)).astype(np.int32)
  return {
    'tokens': rows,
    'segments': np.ones_like(rows),
    'positions': np.broadcast_to(np.arange(T + 1, dtype=np.int32), rows.shape),
  }


class RunsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    (cls.folder / 'corpus').mkdir()
    for i in range(12):
      text = ''.join(f'def f{j}(x):\n  return x + {i}\n' for j in range(30))
      (cls.folder / 'corpus' / f'part{i}.py').write_text(text)
    cls.dense = cls.fit('dense', run_config(cls.folder, tiny.MLA))
    cls.warm_config = run_config(
      cls.folder,
      dataclasses.replace(SPARSE, stage='dense'),
      cls.folder / 'dense',
      tokens=T * 4 * 40,
      trainable=('indexer',),
      recall_goal=0.01,
    )
    cls.warm = cls.fit('warm', cls.warm_config)

  @classmethod
  def fit(cls, name, config):
    return loop.fit(config, cls.folder / name, console=False)

  def test_the_warm_up_moves_the_indexer_alone(self):
    before = flatten(self.dense.variables)
    after = flatten(self.warm.variables)
    new = set(after) - set(before)
    self.assertTrue(all('indexer' in name for name in new))
    self.assertLen(new, 5)
    for name, value in before.items():
      np.testing.assert_array_equal(after[name], value, err_msg=name)
    fresh = loop.fresh_state(self.warm_config, self.warm.model).params
    for name, value in flatten({'params': fresh}).items():
      if 'indexer' in name:
        self.assertGreater(np.abs(after[name] - value).max(), 1e-4, name)

  def test_frozen_parameters_have_no_moments(self):
    names = flatten(self.warm.state.moments)
    moments = [n for n in names if 'mu' in n]
    self.assertLen(moments, 5)
    self.assertTrue(all('indexer' in n for n in moments))

  def test_the_goal_of_recall_ends_it_and_it_stays_ended(self):
    rows = metrics.read(self.folder / 'warm')
    self.assertLen(rows, 10)
    self.assertEqual(int(self.warm.state.step), 10)
    for row in rows:
      self.assertGreater(row['attention_loss'], 0)
      self.assertBetween(row['recall'], 0.01, 1)
    again = self.fit('warm', self.warm_config)
    self.assertEqual(int(again.state.step), 10)
    self.assertLen(metrics.read(self.folder / 'warm'), 10)

  def test_the_sparse_stage_goes_on_and_moves_everything(self):
    config = run_config(self.folder, SPARSE, self.folder / 'warm')
    run = self.fit('sparse', config)
    before, after = flatten(self.warm.variables), flatten(run.variables)
    self.assertEqual(set(before), set(after))
    for name, value in before.items():
      if 'k_norm' not in name:
        self.assertGreater(np.abs(after[name] - value).max(), 1e-5, name)
    self.assertIn('recall', metrics.read(self.folder / 'sparse')[0])

  def test_a_run_with_another_tokenizer_is_refused(self):
    other = self.folder / 'other'
    other.mkdir()
    (other / 'tokenizer.json').write_text('{}')
    with self.assertRaisesRegex(ds.InputError, 'its tokenizer is another'):
      warm_start.check_tokenizer(datalib.ByteTokenizer(), other)

  def test_what_cannot_be_begun_with_leaves_the_folder_free(self):
    unsaved = self.folder / 'unsaved'
    unsaved.mkdir()
    written = (self.folder / 'dense' / 'config.json').read_text()
    (unsaved / 'config.json').write_text(written)
    narrow = ds.changed(model(tiny.MLA), {'ffn.width': 8})
    for source, changes, message, reads in (
      ('nope', {}, 'nope.*holds no run', 0),
      ('unsaved', {}, 'unsaved.*has saved no checkpoint', 0),
      ('dense', {'model': narrow}, r'dense.* is \[', 1),
    ):
      config = run_config(self.folder, tiny.MLA, self.folder / source)
      config = dataclasses.replace(config, **changes)
      opened = mock.patch.object(sources, 'opened', wraps=sources.opened)
      wrong = self.assertRaisesRegex(ds.InputError, f'init_from = .*{message}')
      with opened as read, wrong:
        self.fit('free', config)
      # What needs no tokens is said before the text is read.
      self.assertEqual(read.call_count, reads)
      self.assertFalse((self.folder / 'free').exists())


@functools.cache
def warm_up():
  """Metrics of each step on one batch, the state before and after."""
  made = ds.build(model(dataclasses.replace(SPARSE, stage='dense')))
  cfg = recipe(trainable=('indexer',))
  step = jax.jit(train.train_step(made, cfg))
  first = state = train.initial_state(made, cfg, tiny.draw(made))
  seen = []
  for _ in range(60):
    state, row = step(state, batch())
    seen.append({k: float(row[k]) for k in ('attention_loss', 'recall')})
  return seen, first, state


class WarmUpTest(absltest.TestCase):
  def test_the_indexer_learns_to_imitate_attention(self):
    seen, _, _ = warm_up()
    self.assertLess(seen[-1]['attention_loss'], seen[0]['attention_loss'] / 2)
    self.assertGreater(seen[-1]['recall'], seen[0]['recall'] + 0.05)

  def test_router_biases_are_frozen_with_the_rest(self):
    made = ds.build(
      dataclasses.replace(
        model(tiny.ATTENTIONS['gqa']),
        layout=((('moe',), 1),),
        moe=tiny.V3_MOE,
      )
    )
    for names, moves in ((('attention',), False), (('ffn',), True)):
      cfg = recipe(trainable=names)
      state = train.initial_state(made, cfg, tiny.draw(made))
      after, _ = jax.jit(
        train.train_step(made, cfg),
        compiler_options={'xla_backend_optimization_level': 0},
      )(state, batch())
      bias = lambda s: s.buffers['segments'][0][0]['ffn']['router']['bias']
      self.assertEqual(bool((bias(after) != bias(state)).any()), moves, names)

  def test_only_trained_parameters_count_in_the_gradient_norm(self):
    made = ds.build(model(SPARSE))
    cfg = recipe(trainable=('k_norm',))
    state = train.initial_state(made, cfg, tiny.draw(made))
    _, row = jax.jit(train.train_step(made, cfg))(state, batch())

    def loss(params):
      shares = train.Shares(jnp.float32(4 * T), 1, jnp.float32(0))
      variables = {'params': params, 'buffers': state.buffers}
      return train.loss_and_metrics(
        made, variables, batch(), shares, tiny.PRETRAINING
      )[0]

    grads = jax.jit(jax.grad(loss))(state.params)
    norm = grads['segments'][0][0]['attention']['indexer']['k_norm']
    want = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(norm)))
    np.testing.assert_allclose(row['grad_norm'], want, rtol=1e-5)

  def test_layers_losses_add_up_and_recall_is_their_mean(self):
    layer = lambda loss, recall: {
      'attention': {'loss': jnp.float32(loss), 'recall': jnp.float32(recall)},
      'ffn': {},
    }
    stacked = jax.tree.map(lambda a: jnp.stack([a, 3 * a]), layer(1.0, 0.2))
    aux = {'segments': [[stacked]], 'mtp': [layer(2.0, 0.4)]}
    shares = train.Shares(jnp.float32(1), 2, jnp.float32(0), jnp.float32(1))
    loss, row = layer_losses.attention_losses(aux, shares)
    self.assertAlmostEqual(float(loss), (1 + 3 + 2) / 2, places=6)
    self.assertAlmostEqual(float(row['attention_loss']), 3, places=6)
    self.assertAlmostEqual(float(row['recall']), 1.2 / 3 / 2, places=6)


class InputTest(absltest.TestCase):
  def test_a_goal_that_nothing_measures_is_refused(self):
    folder = Path('unused')
    unmeasured = dataclasses.replace(SPARSE, recall_queries=0)
    for attention in (tiny.MLA, unmeasured):
      with self.assertRaisesRegex(ds.InputError, 'recall_goal = 0.5: no att'):
        run_config(folder, attention, recall_goal=0.5)
    for attention in (
      SPARSE,
      dataclasses.replace(unmeasured, stage='dense'),
      ds.changed(ds.presets.v4_tiny().attention, {'compress': 'csa'}),
    ):
      run_config(folder, attention, recall_goal=0.5)
    with self.assertRaisesRegex(ds.InputError, 'recall_goal = 90: must lie in'):
      recipe(recall_goal=90)

  def test_a_name_of_nothing_is_refused(self):
    abstract = ds.build(model(SPARSE)).abstract['params']
    with self.assertRaisesRegex(ds.InputError, "has 'indexr' in its path"):
      frozen.check(abstract, ('indexr',))

  def test_weights_without_a_place_or_of_another_shape_are_refused(self):
    fresh = {'params': {'a': np.zeros(2), 'indexer': np.ones(3)}}
    got, new = warm_start.variables(fresh, {'params': {'a': np.ones(2)}}, 'r')
    np.testing.assert_array_equal(got['params']['a'], 1)
    self.assertEqual(new, ['params.indexer'])
    with self.assertRaisesRegex(ds.InputError, 'params.b has no place'):
      warm_start.variables(fresh, {'params': {'b': np.ones(2)}}, 'r')
    with self.assertRaisesRegex(ds.InputError, r'params.a is \[4\] there and'):
      warm_start.variables(fresh, {'params': {'a': np.ones(4)}}, 'r')


if __name__ == '__main__':
  absltest.main()
