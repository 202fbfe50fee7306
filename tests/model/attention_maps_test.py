"""Attention maps: they make the layer's own output, recall and choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention.compressor import tail_rope
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.context import context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.functional import functional
from deepseek_jax.model.transformer_config import Kind
from tests import tiny

T, K = 21, 4
DSA = DSAConfig(
  **{f.name: getattr(tiny.MLA, f.name) for f in dataclasses.fields(tiny.MLA)},
  indexer=IndexerConfig(3, 6),
  top_k=K,
  recall_queries=T,
  block=8,
)


def v4():
  return ds.changed(
    ds.presets.v4_tiny(),
    {
      'vocab_size': tiny.VOCAB,
      'dim': 24,
      'attention.window': 5,
      'attention.csa.top_k': 3,
      'attention.csa.recall_queries': T,
      'attention.hca.ratio': 8,
      'ffn': FFNConfig(8),
      'mtp.depth': 0,
      'kinds': {
        name: Kind('ffn', (('attention.compress', compress),))
        for name, compress in (('near', 'none'), ('csa', 'csa'), ('hca', 'hca'))
      },
      'layout': ((('near', 'csa', 'hca'), 1),),
    },
  )


def mla(attention=tiny.MLA):
  return ds.changed(
    tiny.config('v3'),
    {
      'attention': attention,
      'layout': ((('dense',), 1), (('dense',), 2)),
      'mtp.depth': 0,
    },
  )


CONFIGS = {
  'mla': mla,
  'qk_norm': lambda: tiny.config('qk_norm'),
  'dsa': lambda: mla(DSA),
  'in_blocks': lambda: mla(
    dataclasses.replace(
      DSA, indexer=IndexerConfig(3, 6, blocks=IndexBlocksConfig(2, 4))
    )
  ),
  'dsa_dense': lambda: mla(dataclasses.replace(DSA, stage='dense')),
  'v4': v4,
  'v4_all': lambda: ds.changed(v4(), {'attention.csa.top_k': 99}),
  'v4_dense': lambda: ds.changed(v4(), {'attention.csa.stage': 'dense'}),
}


@functools.cache
def looked(name):
  """Returns (model, variables, tokens, layers, maps) of a configuration."""
  model = ds.build(CONFIGS[name]())
  variables = tiny.draw(model)
  tokens = tiny.tokens(2, T)
  layers = ds.attention_layers(model, variables, tokens)
  return (
    model,
    variables,
    tokens,
    layers,
    ds.attention_maps(model, variables, tokens),
  )


def module(layer, dim):
  """Returns the attention of a layer as a module with its weights."""
  make = lambda key: layer.config.build(dim, std=0.0, rngs=nnx.Rngs(key))
  return functional(make, jnp.float32).merge(
    {'params': layer.params, 'buffers': {}}
  )


def from_tokens(layer, shares):
  """Returns what heads with these shares of the tokens return [B T D]."""
  w = jax.tree.map(np.float64, layer.params)
  x, p = np.float64(layer.x), np.float64(shares)
  if 'kv_up' not in w:
    v = np.einsum('BSD,DGK->BSGK', x, w['v'])
    v = np.repeat(v, layer.config.heads // layer.config.kv_heads, axis=2)
  else:
    c = (x @ w['kv_down'])[..., : layer.config.kv_rank]
    c /= np.sqrt((c * c).mean(-1, keepdims=True) + layer.config.norm_eps)
    c *= w['kv_norm']['scale']
    v_up = w['kv_up'][..., layer.config.nope_dim :]
    v = np.einsum('BSC,CHV->BSHV', c, v_up)
  y = np.einsum('BHTS,BSHV->BTHV', p, v)
  return np.einsum('BTHV,HVD->BTD', y, w['out'])


pytestmark = pytest.mark.slow


class MapsTest(parameterized.TestCase):
  @parameterized.parameters('mla', 'qk_norm', 'dsa_dense')
  def test_shares_times_values_are_the_layers_output(self, name):
    _, _, _, layers, maps = looked(name)
    for layer, one in zip(layers, maps, strict=True):
      made = from_tokens(layer, one.tokens)
      self.assertLess(tiny.relative(made, layer.y), 1e-5)

  @parameterized.parameters('dsa', 'in_blocks')
  def test_over_the_chosen_tokens_they_are_the_sparse_layers_output(self, name):
    _, _, _, layers, maps = looked(name)
    for layer, one in zip(layers, maps, strict=True):
      kept = np.where(one.chosen[:, None], one.tokens, 0)
      made = from_tokens(layer, kept / kept.sum(axis=-1, keepdims=True))
      self.assertLess(tiny.relative(made, layer.y), 1e-5)
      everything = from_tokens(layer, one.tokens)
      self.assertGreater(tiny.relative(everything, layer.y), 1e-2)

  @parameterized.parameters('v4_all', 'v4_dense')
  def test_window_entries_and_sinks_are_v4s_output(self, name):
    model, _, tokens, layers, maps = looked(name)
    ctx = context(jnp.asarray(tokens), None, tiny.VOCAB)
    for layer, one in zip(layers, maps, strict=True):
      own, cfg, x = module(layer, model.config.dim), layer.config, layer.x
      kv = own.kv_norm(x @ layer.params['kv'])
      kv = tail_rope(kv, ctx.positions, cfg.layer_rope, cfg.rope_dim)
      read = jnp.einsum('BHTS,BSC->BTHC', one.tokens, kv)
      if one.entries is not None:
        entries, _ = own.far.compressor(x, ctx, None)
        read += jnp.einsum('BHTE,BEC->BTHC', one.entries, entries)
      made = own.output(read, ctx.positions)
      self.assertLess(tiny.relative(made, layer.y), 2e-5)

  @parameterized.parameters(*CONFIGS)
  def test_shares_add_up_to_one_and_see_no_future(self, name):
    for one in looked(name)[-1]:
      total = one.tokens.sum(axis=-1)
      future = np.triu(np.ones((T, T)), 1)
      self.assertEqual(float(abs(one.tokens * future).max()), 0)
      if one.entries is not None:
        total += one.entries.sum(axis=-1)
        # An entry is seen once its last token is there.
        ends = one.ratio * (np.arange(one.entries.shape[-1]) + 1) - 1
        early = ends[None] > np.arange(T)[:, None]
        self.assertEqual(float(abs(one.entries * early).max()), 0)
      if one.sinks is not None:
        total += one.sinks
        self.assertGreater(float(one.sinks.min()), 0)
      np.testing.assert_allclose(total, 1, atol=1e-5)

  @parameterized.parameters('dsa', 'dsa_dense', 'v4', 'v4_dense')
  def test_recall_is_the_metric_of_training(self, name):
    model, variables, tokens, _, maps = looked(name)
    out = jax.jit(functools.partial(model.apply, train=True))(variables, tokens)
    wanted = [
      float(value)
      for patterns in out.aux['segments']
      for stats in zip(*[_repeats(s['attention'], 'recall') for s in patterns])
      for value in stats
      if value is not None
    ]
    found = []
    for one in maps:
      if one.index is None:
        continue
      mass = one.tokens if one.entries is None else one.entries
      able = np.asarray(mass.sum(axis=(1, 3))) > 0  # has something to choose
      np.testing.assert_allclose(one.index.sum(axis=-1)[able], 1, atol=1e-5)
      recall = np.asarray(one.recall())
      found.append(np.mean([r[a].mean() for r, a in zip(recall, able)]))
    self.assertLen(found, len(wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-5)

  def test_as_many_are_chosen_as_there_are_and_may_be(self):
    for one in looked('dsa')[-1]:
      some = np.broadcast_to(np.minimum(np.arange(T) + 1, K), (2, T))
      np.testing.assert_array_equal(one.chosen.sum(axis=-1), some)

  def test_layers_are_in_order_with_weights_of_their_own(self):
    model, variables, tokens, layers, _ = looked('mla')
    self.assertEqual([layer.number for layer in layers], [0, 1, 2])
    stack = variables['params']['segments'][1][0]['attention']
    for repeat in (0, 1):
      np.testing.assert_array_equal(
        layers[1 + repeat].params['out'], stack['out'][repeat]
      )
    # The first reads the normed embedding.
    x = np.float64(variables['params']['embed'][tokens])
    x /= np.sqrt((x * x).mean(-1, keepdims=True) + model.config.norm_eps)
    scale = variables['params']['segments'][0][0]['attention_norm']['scale']
    np.testing.assert_allclose(layers[0].x, x * scale[0], rtol=1e-4, atol=1e-5)

  def test_kinds(self):
    kinds = [(one.kind, one.ratio) for one in looked('v4')[-1]]
    self.assertEqual(kinds, [('window', 1), ('csa', 4), ('hca', 8)])
    for one in looked('mla')[-1]:
      self.assertEqual((one.kind, one.ratio), ('mla', 1))
      self.assertIsNone(one.target())
      self.assertIsNone(one.recall())

  def test_wrong_tokens_and_variables_are_one_line(self):
    model, variables, tokens, _, _ = looked('mla')
    for look in (ds.attention_maps, ds.attention_layers):
      with self.assertRaisesRegex(ds.InputError, 'model: is .*; give what ds'):
        look(model.config, variables, tokens)
      with self.assertRaisesRegex(ds.InputError, 'tokens'):
        look(model, variables, tokens[0])
      with self.assertRaisesRegex(ds.InputError, 'vocabulary'):
        look(model, variables, tokens + tiny.VOCAB)
      with self.assertRaisesRegex(ds.InputError, 'variables: '):
        look(model, variables['params'], tokens)

  def test_another_attention_is_refused_in_one_line(self):
    model = ds.build(ds.presets.nsa_tiny())
    with self.assertRaisesRegex(
      ds.InputError,
      'layer 0: attention maps of nsa are not known; those of mla',
    ):
      ds.attention_maps(model, {}, tiny.tokens(1, 8))


def _repeats(stats, name):
  """Returns a statistic's values over the repeats, [None] without any."""
  return np.asarray(stats[name]) if name in stats else [None]


if __name__ == '__main__':
  absltest.main()
