"""Like kernel_cases, for whole models: a training step, the engine's decoding.

Of a training step of_floor is the model's share of the device's FLOP/s (MFU),
counted without what is recomputed. Decoding reads every weight and the latents
of all requests once a token. Both are compared with the layers' own code, which
other GPUs run: the reference scores all keys at once and fits no GPU.
"""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as ds
from benchmarks.kernel_work import Work, bf16, fresh_keys, nbytes
from deepseek_jax import presets
from deepseek_jax.infer import host_arrays
from deepseek_jax.infer.paging import Store, paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.programs import Shape as EngineShape
from deepseek_jax.infer.programs import plain
from deepseek_jax.infer.sampler import words
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.stacks import unstack
from deepseek_jax.plan.flops import count_flops, decode_flops
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train
from pallas_kernels.target import targeting


class Train(NamedTuple):
  """A training step: the model's sizes, rows of the batch, tokens of a row."""

  layers: int
  dim: int
  heads: int
  experts: int
  width: int
  vocab: int
  batch: int
  length: int


class Decode(NamedTuple):
  """A call of the engine: layers of V2-Lite, rows, tokens cached, steps."""

  layers: int
  rows: int
  cached: int
  steps: int
  drafts: int = 0
  narrow: bool = False  # few of everything that no kernel asks for


# 1.4 billion parameters, 0.3 of them active: V2-Lite's layer at half its width.
TRAIN = {'moe_1b4_t32768': Train(12, 1024, 16, 64, 512, 32768, 8, 4096)}
DECODE = {
  'v2_lite_l6_b64_kv4096': Decode(6, 64, 4096, 8),
  'v2_lite_l6_b8_kv16384': Decode(6, 8, 16384, 8),
}


OWN = 'own'  # as `impl`: the layers' own code, without a kernel


def _under(impl) -> contextlib.AbstractContextManager:
  """Where to trace: own code is what a GPU without kernels gets."""
  if impl == OWN:
    return targeting('cuda', '8.0')
  return contextlib.nullcontext()


def _with(model, impl, dtype='bfloat16'):
  impl = None if impl == OWN else impl
  compute = dataclasses.replace(
    model.config.compute, kernels=impl, dtype=dtype, remat='none'
  )
  return ds.build(dataclasses.replace(model.config, compute=compute))


def _train_model(shape):
  S = shape
  return ds.build(
    ds.TransformerConfig(
      vocab_size=S.vocab,
      dim=S.dim,
      layout=presets.layout(1, S.layers - 1),
      attention=MLAConfig(S.heads, None, 512, 128, 64, 128),
      ffn=FFNConfig(4 * S.dim),
      moe=MoEConfig(S.experts, min(6, S.experts), S.width, shared=2),
    )
  )


def training(shape):
  """One step with its update; the state is donated, as in a run."""
  model, keys = _train_model(shape), fresh_keys(2)
  cfg = train.TrainConfig(
    tokens=1e9,
    batch=schedules.BatchConfig(shape.batch),
    schedule=schedules.ScheduleConfig('constant', peak=1e-4, warmup=0),
  )
  size = shape.batch, shape.length + 1
  tokens = jax.random.randint(keys[0], size, 0, shape.vocab)
  variables = jax.jit(model.init)(keys[1])
  state = train.initial_state(model, cfg, variables)

  def step(tokens, state, impl, dtype='bfloat16'):
    # Without segments: each row is one document, and none of it padding.
    one = train.train_step(_with(model, impl, dtype), cfg)
    with _under(impl):
      return one(state, {'tokens': tokens})

  def op(tokens, state, impl, dtype='bfloat16'):
    metrics = step(tokens, state, impl, dtype)[1]
    return metrics['loss'], metrics['block_norms']

  flops = count_flops(model.config, shape.length, seen='triangle')
  return Work(
    op,
    (tokens, state),
    functools.partial(op, impl=OWN, dtype='float32'),
    3.0 * shape.batch * sum(flops.forward.values()),
    0,
    {},
    in_place=lambda *a, impl: step(*a, impl)[0],
    tokens=shape.batch * shape.length,
    plain=OWN,
  )


def training_small(shape):
  return shape._replace(
    layers=2, dim=256, heads=1, experts=8, width=128, vocab=96, batch=1,
    length=130,
  )  # fmt: skip


def _decode_model(shape):
  config = presets.v2_lite()
  config = dataclasses.replace(
    config,
    layout=presets.layout(1, shape.layers - 1),
    compute=dataclasses.replace(config.compute, dtype='bfloat16'),
  )
  if shape.narrow:
    config = dataclasses.replace(
      config,
      vocab_size=96,
      dim=256,
      attention=dataclasses.replace(config.attention, heads=1),
      ffn=FFNConfig(128),
      moe=dataclasses.replace(config.moe, experts=8, width=128),
    )
  return ds.build(config)


def decoding(shape):
  """A loop of the engine's decoding on pages in random order; the store last.

  What is compared are the latents of the first new tokens that the last layer
  has written: they rest on the attention and the experts of those before.
  """
  model, keys = _decode_model(shape), fresh_keys(3)
  flat = build_flat(model)
  paged = paging(flat, 64)
  pages = -(-(shape.cached + shape.steps) // paged.page)
  bucket = host_arrays.Bucket(shape.rows, 1, pages)
  # Drawn in bfloat16: in float32 a model may not fit beside its copy.
  like = jax.eval_shape(
    lambda key: unstack(model.config, model.cast(model.init(key))), keys[0]
  )
  draw = lambda a: (
    0.02 * jax.random.normal(keys[1], a.shape, a.dtype)
    if jnp.issubdtype(a.dtype, jnp.floating)
    else jnp.zeros(a.shape, a.dtype)
  )
  variables = jax.jit(lambda: jax.tree.map(draw, like))()
  store = jax.eval_shape(
    lambda: paged.empty(shape.rows * pages + 1, shape.rows)
  )
  pools = tuple(bf16(keys[2], *a.shape) for a in store.pages)
  store = Store(pools, tuple(jnp.zeros(a.shape, a.dtype) for a in store.slots))
  order = np.random.default_rng(0).permutation(shape.rows * pages) + 1
  rows = host_arrays.rows([], bucket, [])._replace(
    slots=np.arange(shape.rows, dtype=np.int32),
    table=order.reshape(shape.rows, pages).astype(np.int32),
    start=np.full(shape.rows, shape.cached, np.int32),
    count=np.ones(shape.rows, np.int32),
  )
  ahead = host_arrays.Ahead(shape.steps, 0, words(model.config.vocab_size))
  going = host_arrays.going([], bucket, [], ahead)._replace(
    limit=np.full(shape.rows, shape.steps, np.int32)
  )
  draws = host_arrays.draws([], bucket, paged.page, model.config.vocab_size)
  args = jax.tree.map(jnp.asarray, (rows, going, draws))
  how = EngineShape(paged, shape.steps, 0, False)

  def step(variables, args, store, impl):
    decode = plain(_with(model, impl), how).decode
    with _under(impl):
      return decode(variables, store, *args)

  def op(variables, args, store, impl):
    store, _ = step(variables, args, store, impl)
    # The token read first depends on no choice of a later one.
    table, start = args[0].table, args[0].start
    page = jnp.take_along_axis(table, start[:, None] // paged.page, axis=1)
    return store.pages[-2][0, page[:, 0], start % paged.page]

  moved = nbytes(*jax.tree.leaves(variables))
  tokens = (
    shape.rows
    * shape.cached
    * sum(leaf.row for leaf in paged.leaves if leaf.ratio == 1)
  )
  each = decode_flops(model.config, shape.cached)['absorbed']
  flops = each * shape.rows * shape.steps
  return Work(
    op,
    (variables, args, store),
    functools.partial(op, impl=OWN),
    float(flops),
    float(shape.steps * (moved + tokens)),
    {},
    in_place=lambda *a, impl: step(*a, impl)[0],
    tokens=shape.rows * shape.steps,
    plain=OWN,
  )


def decoding_small(shape):
  # One layer before the last has experts.
  return shape._replace(layers=3, rows=2, cached=70, steps=2, narrow=True)


OPS = {
  'train_step': (TRAIN, training, training_small),
  'engine_decode': (DECODE, decoding, decoding_small),
}
