"""Tiny models of every family, with weights drawn so that all of them matter.

Compiling dominates on a CPU, so models and jitted calls are made once and
shared by all test files.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.rope import (
  Llama3Config,
  RopeConfig,
  YarnConfig,
)
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.train.objective import PretrainingConfig

VOCAB, DIM = 64, 16

PRETRAINING = PretrainingConfig().build(None)


def together(batch):
  """Returns a batch whose documents attend to each other; padding stays."""
  real = (batch['segments'] > 0).astype(np.int32)
  return {'tokens': batch['tokens'], 'segments': real}


YARN = RopeConfig(scaling=YarnConfig(factor=4.0, original_length=16))
MLA = MLAConfig(2, 12, 16, 8, 4, 6, rope=YARN)
LITE = dataclasses.replace(MLA, q_rank=None)
LLAMA = RopeConfig(
  theta=100.0,
  interleaved=False,
  scaling=Llama3Config(factor=8.0, original_length=32),
)
ATTENTIONS = {
  'mla': MLA,
  'mla_lite': LITE,
  'mha': GQAConfig(4, 4, 6),
  'gqa': GQAConfig(4, 2, 6, rope=LLAMA),
  'mqa': GQAConfig(4, 1, 6),
  'qk_norm': GQAConfig(4, 2, 6, rope=LLAMA, qk_norm=True, norm_eps=0.1),
}
V3_MOE = MoEConfig(
  experts=8,
  top_k=3,
  width=8,
  shared=1,
  router=RouterConfig(groups=4, top_groups=2, scale=2.5),
  balance=BalanceConfig(sequence=0.1),
)
V2_MOE = MoEConfig(
  experts=8,
  top_k=3,
  width=8,
  shared=2,
  router=RouterConfig(
    scoring='softmax',
    groups=4,
    top_groups=2,
    group_score='max',
    bias=False,
    normalize=False,
    scale=16.0,
  ),
  balance=BalanceConfig(
    expert=0.03, device=0.05, communication=0.02, devices=4, device_limit=2
  ),
)
GREEDY_MOE = dataclasses.replace(
  V2_MOE,
  router=RouterConfig(scoring='softmax', bias=False, normalize=False),
  balance=BalanceConfig(expert=0.001),
)


def _config(attention, moe, layout, **fields):
  return ds.TransformerConfig(
    VOCAB, DIM, layout, attention, FFNConfig(24), moe, **fields
  )


@functools.cache
def config(name: str) -> ds.TransformerConfig:
  """A family, an attention, or a mixture ('mixed', 'dense_mtp', 'step')."""
  first_dense = ((('dense',), 1), (('moe',), 2))
  pattern = ((('dense', 'moe'), 2),)
  if name in ATTENTIONS:
    return _config(ATTENTIONS[name], None, ((('dense',), 2),))
  return {
    'v3': lambda: _config(MLA, V3_MOE, first_dense, mtp=MTPConfig(1)),
    'v2': lambda: _config(MLA, V2_MOE, first_dense),
    'lite': lambda: _config(LITE, GREEDY_MOE, first_dense),
    'moe16b': lambda: _config(ATTENTIONS['mha'], GREEDY_MOE, first_dense),
    'llama': lambda: _config(
      ATTENTIONS['gqa'], None, ((('dense',), 2),), norm_eps=1e-5
    ),
    'dense_mtp': lambda: _config(
      ATTENTIONS['gqa'],
      None,
      ((('dense',), 1),),
      mtp=MTPConfig(2, 'dense'),
      tied=True,
    ),
    'step': lambda: _config(  # one MoE body: quick to compile
      ATTENTIONS['gqa'], V3_MOE, ((('moe',), 2),), mtp=MTPConfig(1, 'dense')
    ),
    'mixed': lambda: _config(
      MLA, V3_MOE, pattern, mtp=MTPConfig(2, 'dense'), tied=True
    ),
  }[name]()


@functools.cache
def model(name: str) -> ds.Model:
  return ds.build(config(name))


def fill(shapes, seed: int = 0):
  """A tree of shapes -> arrays: norms near 1, biases small, matrices 0.3."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    x = rng.normal(size=leaf.shape)
    if name.endswith('scale'):
      x = 1 + 0.3 * x
    elif name.endswith('bias'):
      x = 0.2 * x
    else:
      x = 0.3 * x
    return jax.numpy.asarray(x, np.float32)

  # Numbers, also where a trace draws them first: caches keep them.
  with jax.ensure_compile_time_eval():
    return jax.tree_util.tree_map_with_path(one, shapes)


def draw(model: ds.Model, seed: int = 0) -> dict:
  """Variables of a model, every leaf random (fresh norms would be all ones)."""
  shapes = {k: nnx.to_pure_dict(v) for k, v in model.abstract.items()}
  return fill(shapes, seed)


@functools.cache
def variables(name: str) -> dict:
  return draw(model(name))


@functools.cache
def jitted(name: str, **flags):
  """apply(variables, tokens, **arrays) of a tiny model; flags are static."""
  return jax.jit(functools.partial(model(name).apply, **flags))


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(1, VOCAB, (rows, length)).astype(np.int32)


def documents(rows: int, length: int, seed: int = 0, padding: int = 0) -> dict:
  """A batch as the data pipeline makes it: a few documents in each row."""
  rng = np.random.default_rng(seed + 1)
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  for row in range(rows):
    used = length - (padding if row == rows - 1 else 0)
    cuts = sorted(rng.choice(np.arange(2, used - 1), 2, replace=False))
    for number, (a, b) in enumerate(zip([0, *cuts], [*cuts, used]), start=1):
      segments[row, a:b] = number
      positions[row, a:b] = np.arange(b - a)
  return {
    'tokens': tokens(rows, length, seed),
    'segments': segments,
    'positions': positions,
  }


def relative(got, want) -> float:
  """Largest error over the largest value."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return float(np.abs(got - want).max() / np.abs(want).max())


def largest(values) -> float:
  """The largest; NaN if one is NaN, which Python's max() may forget."""
  return float(np.max(np.asarray(list(values), np.float64)))


def size(tree) -> int:
  return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))
