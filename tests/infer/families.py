"""A tiny model for every kind of cache that the engine pages."""

import dataclasses
import functools

import numpy as np

import deepseek_jax as ds
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.transformer_config import Kind
from tests import tiny

_MLA = {f.name: getattr(tiny.MLA, f.name) for f in dataclasses.fields(tiny.MLA)}
_SHARED = SharedKVConfig(
  heads=2,
  head_dim=8,
  rope_dim=4,
  q_rank=6,
  groups=2,
  o_rank=5,
  window=5,
  csa=CSAConfig(ratio=4, top_k=3, index_heads=3, index_dim=6),
  hca=HCAConfig(ratio=8),
)
_NSA = NSAConfig(
  heads=4,
  kv_heads=2,
  qk_dim=6,
  v_dim=5,
  block=4,
  stride=2,
  hidden=7,
  select_block=4,
  select=4,
  window=5,
)
_V4 = {
  'window': Kind('ffn'),
  'csa': Kind('ffn', (('attention.compress', 'csa'),)),
  'hca': Kind('ffn', (('attention.compress', 'hca'),)),
}
NAMES = ('gqa', 'mla', 'v3', 'dsa', 'in_blocks', 'nsa', 'v4', 'engram')


@functools.cache
def config(name: str) -> ds.TransformerConfig:
  """Returns the configuration of a family."""
  base = functools.partial(
    ds.TransformerConfig, tiny.VOCAB, tiny.DIM, ffn=FFNConfig(24)
  )
  plain = ((('dense',), 2),)
  if name == 'gqa':
    return tiny.config('gqa')
  if name in ('mla', 'v3'):
    return tiny.config(name)
  if name == 'dsa':
    sparse = DSAConfig(**_MLA, indexer=IndexerConfig(3, 6), top_k=6, block=8)
    return base(plain, sparse)
  if name == 'in_blocks':
    blocks = IndexBlocksConfig(4, 2)
    indexer = IndexerConfig(3, 6, blocks=blocks)
    return base(plain, DSAConfig(**_MLA, indexer=indexer, top_k=6, block=8))
  if name == 'nsa':
    return base(plain, _NSA)
  if name == 'v4':
    return base(
      ((('window', 'csa', 'hca'), 1),),
      _SHARED,
      kinds=_V4,
      residual=HyperConnectionsConfig(streams=2),
    )
  if name == 'v4_of_6':  # tokens an entry of HCA, no power of two
    return ds.changed(config('v4'), {'attention.hca.ratio': 6})
  memory = EngramConfig(base=11, longest=3, heads=2, dim=6, conv=3)
  kinds = {'dense': Kind('ffn'), 'memory': Kind('ffn', engram=True)}
  return base(
    ((('memory', 'dense'), 1),),
    tiny.ATTENTIONS['gqa'],
    kinds=kinds,
    engram=memory,
  )


@functools.cache
def model(name: str) -> ds.Model:
  """Returns the model of a family."""
  return ds.build(config(name))


@functools.cache
def variables(name: str) -> dict:
  """Returns its variables, every leaf random."""
  return tiny.draw(model(name)) if name != 'engram' else _engram()


def _engram() -> dict:
  """Returns an Engram's variables: its hashes are not to be drawn."""
  import jax

  drawn = tiny.draw(model('engram'))
  own = model('engram').init(jax.random.key(0))
  return {**drawn, 'buffers': own['buffers']}


def check_same(got, want):
  """Checks that two answers have the same tokens, and log-probs to 1e-5."""
  np.testing.assert_array_equal(got.tokens, want.tokens)
  logs = lambda answer: [p.logprob for p in answer.logprobs]
  np.testing.assert_allclose(logs(got), logs(want), rtol=0, atol=1e-5)
