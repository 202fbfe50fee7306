"""Makes what `benchmarks.growth` measures: a program for each point.

A point is named study/what/pass/size, as in tokens/DSA/step/4096.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import deepseek_jax as ds
from benchmarks import sparse
from benchmarks.sparse import DIM
from deepseek_jax.model.attention import dsa
from deepseek_jax.model.attention.indexer import IndexBlocksConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.parallel import processor
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train


class Point(NamedTuple):
  """Names a program: what grows, of what, in which pass, and its size."""

  study: str
  what: str
  run: str
  size: int

  @property
  def key(self) -> str:
    """Returns study/what/pass/size."""
    return '/'.join(map(str, self))


_LENGTHS = tuple(2048 << i for i in range(6))
_DENSE = 16_384  # longest that MLA reads here: it takes memory as T^1.6
_INDEXER = 'indexer of DSA'
# 1,024 candidates for the 256 keys that a query reads, as HISA has 8,192 for
# 2,048.
_IN_BLOCKS = dataclasses.replace(
  sparse.LAYERS['DSA'],
  indexer=dataclasses.replace(
    sparse.LAYERS['DSA'].indexer, blocks=IndexBlocksConfig(64, 16)
  ),
)
LAYERS = {**sparse.LAYERS, 'DSA in blocks': _IN_BLOCKS}
_SIZES = {
  'experts': (8, 16, 32, 64, 128, 256),
  'layers': (4, 8, 16, 32, 48),
  'batch': (1, 2, 4, 8, 16, 32),
}
_LENGTH = 512  # of the sequences of a model's step


def points() -> list[Point]:
  """Returns all points, the small ones first."""
  tokens = [
    Point('tokens', layer, run, length)
    for length in _LENGTHS
    for layer in (*LAYERS, _INDEXER)
    for run in ('forward', 'step')
    if not (layer == 'MLA' and length > _DENSE)
    if not (layer == _INDEXER and run == 'step')  # it has no gradient
  ]
  models = [
    Point(study, 'V3', 'step', size)
    for study, sizes in _SIZES.items()
    for size in sizes
  ]
  return tokens + models


def program(point: Point) -> tuple[Callable, tuple]:
  """Returns a jitted function and its arguments."""
  if point.study != 'tokens':
    return _model_step(point)
  if point.what == _INDEXER:
    return _indexer(point.size)
  return _layer(LAYERS[point.what], point.run, point.size)


def _layer(cfg, run: str, length: int) -> tuple[Callable, tuple]:
  """Returns a layer's forward, or its gradients, over one sequence."""
  module = cfg.build(DIM, std=0.02, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, length, DIM)), jnp.float32)
  at = jnp.arange(length)[None]

  def out(state, x, train):
    ctx = Context(at * 0, at, None, train=train)
    y, _, stats = nnx.merge(graphdef, state)(x, ctx)
    return y, stats

  def loss(state, x):
    y, stats = out(state, x, True)
    return (y * y).mean() + stats.get('loss', 0.0)

  if run == 'forward':
    call, name = lambda state, x: out(state, x, False)[0], 'prefill'
  else:
    call, name = jax.grad(loss, argnums=(0, 1)), 'train'
  return jax.jit(call, compiler_options=processor.options(name)), (state, x)


def _indexer(length: int) -> tuple[Callable, tuple]:
  """Returns the choice of keys alone: scores of all pairs, and the best k."""
  cfg = LAYERS['DSA']
  J, I = cfg.indexer.heads, cfg.indexer.dim
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  query = dsa.IndexQuery(draw(1, length, J, I), draw(1, length, J))
  keys, at = draw(1, length, I), jnp.arange(length, dtype=jnp.int32)[None]
  call = lambda query, keys: dsa.choose(cfg, query, keys, Visibility(at))
  options = processor.options('prefill')
  return jax.jit(call, compiler_options=options), (query, keys)


def _config(point: Point) -> ds.TransformerConfig:
  """Returns a V3-like model; experts grow at equal active width."""
  grown = {point.study: point.size}
  layers, experts = grown.get('layers', 4), grown.get('experts', 32)
  return ds.TransformerConfig(
    vocab_size=4096,
    dim=256,
    layout=((('dense',), 1), (('moe',), layers - 1)),
    attention=MLAConfig(
      heads=4, q_rank=128, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32
    ),
    ffn=FFNConfig(704),
    moe=MoEConfig(experts=experts, top_k=4, width=128),
  )


def _model_step(point: Point) -> tuple[Callable, tuple]:
  """Returns a training step of a model, its state donated."""
  model = ds.build(_config(point))
  rows = point.size if point.study == 'batch' else 4
  cfg = train.TrainConfig(
    tokens=1e9,
    batch=schedules.BatchConfig(rows),
    schedule=schedules.ScheduleConfig('constant', peak=1e-4, warmup=0),
  )
  variables = jax.jit(model.init)(jax.random.key(0))
  state = jax.jit(lambda v: train.initial_state(model, cfg, v))(variables)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.config.vocab_size, (rows, _LENGTH + 1))
  step = jax.jit(
    train.train_step(model, cfg),
    donate_argnums=0,
    compiler_options=processor.options('train'),
  )
  return step, (state, {'tokens': jnp.asarray(tokens, jnp.int32)})


def described() -> dict:
  """Returns the shapes that the points have, for the file of results."""
  layers = {name: dataclasses.asdict(cfg) for name, cfg in LAYERS.items()}
  of = {
    study: dataclasses.asdict(_config(Point(study, 'V3', 'step', sizes[0])))
    for study, sizes in _SIZES.items()
  }
  return {'layers': {'dim': DIM, **layers}, 'models': of, 'length': _LENGTH}
