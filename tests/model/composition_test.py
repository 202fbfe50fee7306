"""Every attention with every residual, router and memory: one class of models.

Two models hold all pairs of ideas between them, a layer for each combination.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import IndexerConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.residual import ResidualConfig
from deepseek_jax.model.transformer_config import Kind
from deepseek_jax.train import step as train
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import BatchConfig, ScheduleConfig
from deepseek_jax.train.step import TrainConfig
from tests import tiny

T = 14  # so few tokens that experts compile to little
_CSA = SharedKVConfig(
  heads=2,
  head_dim=8,
  rope_dim=4,
  q_rank=8,
  groups=2,
  o_rank=4,
  window=5,
  compress='csa',
  csa=CSAConfig(ratio=2, top_k=3, index_heads=2, index_dim=4),
  hca=HCAConfig(ratio=6),
)
ATTENTIONS = {
  'mla': tiny.MLA,
  'gqa': tiny.ATTENTIONS['gqa'],
  'dsa': DSAConfig(
    **{f.name: getattr(tiny.MLA, f.name) for f in dataclasses.fields(tiny.MLA)},
    indexer=IndexerConfig(heads=2, dim=6),
    top_k=6,
  ),
  'nsa': NSAConfig(
    heads=4,
    kv_heads=2,
    qk_dim=6,
    v_dim=5,
    block=4,
    stride=2,
    hidden=6,
    select_block=4,
    select=3,
    initial=1,
    local=1,
    window=5,
  ),
  'csa': _CSA,
  'hca': dataclasses.replace(_CSA, compress='hca'),
}
ROUTERS = {
  'softmax': RouterConfig(scoring='softmax', bias=False, normalize=False),
  'sigmoid': RouterConfig(groups=2, top_groups=2, scale=2.5),
  'hash': RouterConfig(
    scoring='sqrtsoftplus', bias=False, hash_vocab=tiny.VOCAB
  ),
}
RESIDUALS = {
  'plain': ResidualConfig(),
  'streams': HyperConnectionsConfig(streams=2, iterations=3),
}
# Attention and router, a layer each; a star has a memory.
PAIRS = {
  'plain': (
    ('mla', 'softmax', '*'),
    ('gqa', 'sigmoid', ''),
    ('dsa', 'hash', '*'),
    ('csa', 'softmax', ''),
    ('hca', 'sigmoid', '*'),
    ('mla', 'hash', ''),
    ('gqa', 'softmax', '*'),
    ('dsa', 'sigmoid', ''),
    ('nsa', 'softmax', '*'),
  ),
  'streams': (
    ('csa', 'sigmoid', '*'),
    ('hca', 'hash', ''),
    ('mla', 'sigmoid', '*'),
    ('gqa', 'hash', ''),
    ('dsa', 'softmax', '*'),
    ('csa', 'hash', '*'),
    ('hca', 'softmax', ''),
    ('nsa', 'sigmoid', ''),
    ('nsa', 'hash', '*'),
  ),
}


def config(residual: str, layers: tuple) -> ds.TransformerConfig:
  """A model of such layers, one after the other."""
  kinds = {
    '-'.join(layer): Kind(
      'moe',
      (('attention', ATTENTIONS[layer[0]]), ('moe.router', ROUTERS[layer[1]])),
      engram=bool(layer[2]),
    )
    for layer in layers
  }
  return ds.TransformerConfig(
    tiny.VOCAB,
    tiny.DIM,
    ((tuple(map('-'.join, layers)), 1),),
    tiny.MLA,
    moe=MoEConfig(experts=4, top_k=2, width=6),
    residual=RESIDUALS[residual],
    kinds=kinds,
    engram=EngramConfig(base=11, longest=3, heads=2, dim=4, conv=2),
  )


@functools.cache
def made(residual: str, layers: tuple):
  """A model, and its variables with weights that all matter."""
  model = ds.build(config(residual, layers))
  variables = jax.jit(model.init)(jax.random.key(0))
  return model, {**variables, 'params': tiny.fill(variables['params'])}


def documents() -> dict:
  """A row of two documents and padding; the first is long enough.

  A window of 6 tokens has ended, and two blocks of NSA, before a token that
  counts: softmax over a single block has no gradient of its key.
  """
  return {
    'tokens': tiny.tokens(1, T + 1),
    'segments': np.array([[1] * 10 + [2] * 3 + [0] * 2], np.int32),
    'positions': np.array([[*range(10), *range(3), 0, 0]], np.int32),
  }


class CompositionTest(parameterized.TestCase):
  def check(self, residual, layers):
    self.check_decoding(*made(residual, layers))
    self.check_training(*made(residual, layers))

  def check_decoding(self, model, variables):
    """A prompt and single tokens give the logits of one pass."""
    tokens = jnp.asarray(tiny.tokens(1, T))
    run = jax.jit(model.apply)
    want = run(variables, tokens).logits
    self.assertTrue(np.isfinite(want).all())
    cache, done = model.init_cache(1, T), 0
    for size in (7, *(1,) * 7):
      out = run(variables, tokens[:, done : done + size], cache=cache)
      np.testing.assert_allclose(
        out.logits, want[:, done : done + size], atol=5e-5, rtol=1e-4
      )
      cache, done = out.cache, done + size
    self.assertEqual(done, T)

  def check_training(self, model, variables):
    """One step: a finite loss, and every layer's weights move."""
    recipe = TrainConfig(
      tokens=1e6,
      batch=BatchConfig(1),
      optimizer=OptimizerConfig(decay=0.0),
      schedule=ScheduleConfig('constant', peak=0.01, warmup=0),
    )
    step = jax.jit(train.train_step(model, recipe))
    start = train.initial_state(model, recipe, variables)
    state, metrics = step(start, documents())
    self.assertTrue(np.isfinite(metrics['loss']))
    self.assertTrue(bool(metrics['applied']))
    moved = jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).max()), state.params, start.params
    )
    for path, by in jax.tree_util.tree_leaves_with_path(moved):
      # Adam's first step is of the learning rate wherever there is a gradient.
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      self.assertGreater(by, 1e-4, name)

  @pytest.mark.slow
  def test_sparse_layers_train_and_decode_as_they_read(self):
    self.check('streams', (('dsa', 'hash', '*'), ('csa', 'sigmoid', '')))

  @parameterized.parameters(*PAIRS)
  @pytest.mark.slow
  def test_layers_of_all_ideas_train_and_decode_as_they_read(self, residual):
    self.check(residual, PAIRS[residual])

  def test_the_two_models_hold_every_pair_of_ideas(self):
    layers = [
      (residual, *layer) for residual, many in PAIRS.items() for layer in many
    ]
    ideas = [RESIDUALS, ATTENTIONS, ROUTERS, ('', '*')]
    for i, first in enumerate(ideas):
      for j, second in enumerate(ideas[:i]):
        seen = {(layer[i], layer[j]) for layer in layers}
        self.assertLen(seen, len(first) * len(second))


if __name__ == '__main__':
  absltest.main()
