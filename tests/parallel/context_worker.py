"""Latent attention with split sequences against one device.

python -m tests.parallel.context_worker [slow]
"""

import functools
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.model.attention.latent_reading import (
  Latent,
  latent_attention,
)
from deepseek_jax.model.attention.softmax import causal_attention
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.gathered_attention import expand_latents
from deepseek_jax.parallel.sequence import Along
from deepseek_jax.train import step as train
from deepseek_jax.train.step import Shares
from tests import tiny
from tests.pipeline.pipeline_worker import error

B, T, H, C, N, R, V = 2, 32, 4, 16, 8, 4, 6
SCALE = 0.3
RULES = {'batch': 'data', 'seq': 'context', 'heads': 'tensor'}


def mesh_of(**sizes) -> Mesh:
  devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
  return Mesh(devices.reshape(*sizes.values()), tuple(sizes))


def inputs():
  rng = np.random.default_rng(0)
  shapes = (B, T, H, N + R), (B, T, C), (B, T, R), (C, H, N + V)
  arrays = [np.asarray(rng.normal(size=s), np.float32) for s in shapes]
  return arrays, tiny.documents(B, T, padding=3)['segments']


def expanded(q, c, kr, up, segments):
  """The same by the attention of one device."""
  k, v = expand_latents((H, N + R), (c, kr), up)
  return causal_attention(q, k, v, scale=SCALE, segments=segments)


def split(q, c, kr, up, segments):
  """The same by as many devices as the mesh has."""
  return latent_attention(q, Latent(c, kr), up, scale=SCALE, segments=segments)


def both_ways(f, segments):
  """Value and gradient of a sum that weighs every output differently."""
  weigh = np.random.default_rng(1).normal(size=(B, T, H, V))

  def loss(*arrays):
    y = f(*arrays, segments)
    return (y * weigh.astype(np.float32)).sum(), y

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def attention(sizes: dict, packed: bool) -> float:
  arrays, segments = inputs()
  segments = segments if packed else None
  want = both_ways(expanded, segments)(*arrays)
  mesh = mesh_of(**{'data': 1, 'context': 1, 'tensor': 1} | sizes)
  with sharding.use(mesh, RULES):
    got = both_ways(split, segments)(*arrays)
  return error(got, want)


def model(name: str, sizes: dict, rows: int = 4, length: int = 16) -> dict:
  """Loss, metrics and gradients of a whole model."""
  batch = tiny.documents(rows, length + 1, 0, 5)
  weights = tiny.PRETRAINING.inputs(batch).weights
  shares = Shares(np.float32(weights.sum()), 1, np.float32(0.3))

  def gradient(params, buffers, batch):
    loss = lambda params: train.loss_and_metrics(
      tiny.model(name),
      {'params': params, 'buffers': buffers},
      batch,
      shares,
      tiny.PRETRAINING,
    )
    return jax.value_and_grad(loss, has_aux=True)(params)

  held = tiny.variables(name)
  args = held['params'], held['buffers'], batch
  want = jax.jit(gradient)(*args)
  with sharding.use(mesh_of(**sizes), RULES):
    got = jax.jit(functools.partial(gradient))(*args)
  counts = ('load', 'dropped', 'loads')
  pop = lambda r: {k: r[0][1].pop(k) for k in counts}
  equal = jax.tree.map(np.array_equal, pop(got), pop(want))
  return {'error': error(got, want), 'counts_equal': jax.tree.all(equal)}


def collectives() -> list:
  """Shapes that the compiled forward and backward pass gathers."""
  arrays, segments = inputs()
  with sharding.use(mesh_of(data=1, context=8, tensor=1), RULES):
    text = both_ways(split, segments).lower(*arrays).compile().as_text()
  return [line for line in text.splitlines() if ' all-gather(' in line]


def gathered_sum() -> dict:
  """A bfloat16 gradient from four devices: 256 of the first, 1 of others."""
  mesh = mesh_of(context=4)
  along = Along('context', 4)

  def loss(x):
    every = along.gather(x).astype(np.float32)
    return every.sum() * jax.numpy.where(along.index == 0, 256.0, 1.0)

  gradient = jax.shard_map(
    jax.grad(loss),
    mesh=mesh,
    in_specs=PartitionSpec(None, 'context'),
    out_specs=PartitionSpec(None, 'context'),
    check_vma=False,
  )
  x = jax.numpy.ones((2, 8, 3), 'bfloat16')
  lowered = jax.jit(gradient).lower(x)
  got = np.asarray(lowered.compile()(x), np.float32)
  # A CPU's compiler widens what others add up as it is asked for here.
  return {
    'least': float(got.min()),
    'greatest': float(got.max()),
    'reduced_as_it_is': 'reduce_scatter' in lowered.as_text(),
  }


def attentions(cases) -> dict:
  return {
    f'{sizes} {"packed" if packed else "one document"}': attention(
      sizes, packed
    )
    for sizes, packed in cases
  }


FAST = (
  ({'context': 4, 'tensor': 2}, True),
  ({'data': 2, 'context': 4}, False),
)
SLOW = (
  ({'context': 2}, True),
  ({'context': 2}, False),
  ({'context': 4, 'tensor': 2}, False),
  ({'data': 2, 'context': 4}, True),
  ({'context': 8}, True),
  ({'context': 8}, False),
)


def main(slow: bool) -> dict:
  if not slow:
    return {
      'attention': attentions(FAST),
      'gathers': collectives(),
      'sum': gathered_sum(),
    }
  sizes = {'data': 1, 'context': 4, 'tensor': 2}
  return {'attention': attentions(SLOW), 'model': model('v3', sizes)}


if __name__ == '__main__':
  print(json.dumps(main('slow' in sys.argv)))
