"""Every attention with split sequences against one device.

python -m tests.parallel.split_worker CASE...

prints for each the greatest differences of values, gradients and statistics,
and what the compiled program gathers and multiplies.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
from flax import nnx

from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import RULES
from deepseek_jax.plan.compiled_collectives import collectives
from tests import tiny
from tests.parallel.context_worker import mesh_of
from tests.parallel.matmuls import matmuls
from tests.pipeline.pipeline_worker import error

B, T, DIM = 2, 24, 16
LONG = 256  # so long that attention outweighs the expansion of latents
RULES = {**RULES, 'batch': 'data', 'seq': 'context', 'embed': None}
_GATHERS = ('all-gather', 'all-to-all')
_MLA = {f.name: getattr(tiny.MLA, f.name) for f in dataclasses.fields(tiny.MLA)}
DSA = DSAConfig(
  **_MLA, indexer=IndexerConfig(4, 6), top_k=5, recall_queries=5, block=4
)
WINDOW = SharedKVConfig(
  heads=4,
  head_dim=10,
  rope_dim=4,
  q_rank=6,
  groups=2,
  o_rank=5,
  window=5,
  csa=CSAConfig(ratio=4, top_k=2, index_heads=2, index_dim=6, block=4),
  hca=HCAConfig(ratio=8),
)
CSA = dataclasses.replace(WINDOW, compress='csa')
HCA = dataclasses.replace(WINDOW, compress='hca')
_csa = lambda **f: dataclasses.replace(
  CSA, csa=dataclasses.replace(CSA.csa, **f)
)
NSA = NSAConfig(
  heads=4,
  kv_heads=2,
  qk_dim=6,
  v_dim=5,
  block=4,
  stride=2,
  hidden=7,
  select_block=4,
  select=3,
  window=5,
  queries=4,
)
LAYERS = {
  'gqa': tiny.ATTENTIONS['gqa'],
  'mha': tiny.ATTENTIONS['mha'],
  'qk_norm': tiny.ATTENTIONS['qk_norm'],
  'dsa_dense': dataclasses.replace(DSA, stage='dense'),
  'dsa': DSA,
  'in_blocks': dataclasses.replace(
    DSA, indexer=IndexerConfig(4, 6, blocks=IndexBlocksConfig(2, 4))
  ),
  'window': WINDOW,
  'wide_window': dataclasses.replace(WINDOW, window=15),
  'csa': CSA,
  'csa_odd': _csa(ratio=5, top_k=2),
  'csa_all': _csa(top_k=100),
  'hca': HCA,
  'hca_odd': dataclasses.replace(HCA, hca=HCAConfig(ratio=7)),
  'nsa': NSA,
  # Indexers that score everything 0: the lowest places win.
  'dsa_ties': DSA,
  'csa_ties': CSA,
}


@functools.cache
def inputs(packed: bool):
  rng = np.random.default_rng(5)
  x = np.asarray(rng.normal(size=(B, T, DIM)), np.float32)
  if not packed:
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return x, at, None
  batch = tiny.documents(B, T, padding=3)
  return x, batch['positions'], batch['segments']


@functools.cache
def weigh(length: int) -> np.ndarray:
  """So that every output counts differently."""
  shape = B, length, DIM
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@functools.cache
def layer(name: str):
  """(weights, (weights, x, positions, segments) -> loss and what it sees)."""
  module = LAYERS[name].build(DIM, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  state = nnx.to_pure_dict(state)

  def loss(weights, x, positions, segments):
    ctx = Context(positions * 0, positions, segments, train=True)
    y, _, stats = nnx.merge(graphdef, weights)(x, ctx)
    total = (y * weigh(x.shape[1])).sum() + 0.7 * stats.get('loss', 0)
    return total, (y, stats)

  weights = tiny.fill(state)
  if name.endswith('ties'):
    far = weights.get('far', weights)
    far['indexer']['weights'] = 0 * far['indexer']['weights']
  return weights, loss


def gradient(name: str, mesh=None):
  """The jitted gradient, on a mesh if there is one."""
  loss = layer(name)[1]
  run = jax.value_and_grad(lambda *a: loss(*a), (0, 1), has_aux=True)
  if mesh is None:
    return jax.jit(run)

  def placed(weights, x, *rest):
    return run(weights, sharding.shard(x, 'batch', 'seq', None), *rest)

  return jax.jit(placed)


def compiled(name: str, mesh, arrays):
  """The gradient on a mesh, or on one device; quickly compiled."""
  weights = layer(name)[0]
  options = {'xla_backend_optimization_level': 0}
  if mesh is None:
    return gradient(name).lower(weights, *arrays).compile(options)
  with sharding.use(mesh, RULES):
    return gradient(name, mesh).lower(weights, *arrays).compile(options)


def grid(sizes: dict):
  return mesh_of(**{'data': 1, 'context': 1, 'tensor': 1} | sizes)


def equality(name: str, sizes: dict, packed: bool) -> dict:
  """The greatest differences, and what is gathered."""
  arrays, mesh = inputs(packed), grid(sizes)
  done = compiled(name, mesh, arrays)
  (total, (y, stats)), grads = done(layer(name)[0], *arrays)
  want = compiled(name, None, arrays)(layer(name)[0], *arrays)
  (total_, (y_, stats_)), grads_ = want
  found = collectives(done.as_text(), mesh.size)
  return {
    'values': error((y, stats), (y_, stats_)),
    'gradients': error(grads, grads_),
    # A sum of both signs, so by what it is a sum of.
    'loss': float(abs(total - total_) / np.abs(y_ * weigh(T)).sum()),
    'statistics': {name: float(value) for name, value in stats_.items()},
    'gathered': sorted(
      {a.shape for c in found if c.kind in _GATHERS for a in c.arrays}
    ),
  }


def work(name: str, ways: int) -> dict:
  """Multiply-adds of matmuls of a device, and of one that is alone."""
  x = jax.ShapeDtypeStruct((1, LONG, DIM), np.float32)
  row = jax.ShapeDtypeStruct((1, LONG), np.int32)
  alone, split = (
    matmuls(compiled(name, mesh, (x, row, row)).as_text())
    for mesh in (None, grid({'context': ways}))
  )
  return {'alone': alone, 'split': split}


CASES = {
  **{
    f'{name} context={n} {"packed" if packed else "one document"}': (
      equality,
      name,
      {'context': n},
      packed,
    )
    for name in LAYERS
    for n in (2, 4)
    for packed in (False, True)
  },
  **{
    f'{name} context=2 tensor=2': (
      equality,
      name,
      {'context': 2, 'tensor': 2},
      True,
    )
    for name in (
      'gqa',
      'qk_norm',
      'dsa_dense',
      'dsa',
      'in_blocks',
      'csa',
      'hca',
      'nsa',
    )
  },
  'dsa data=2 context=2': (equality, 'dsa', {'data': 2, 'context': 2}, True),
  'csa data=2 context=2': (equality, 'csa', {'data': 2, 'context': 2}, True),
  **{
    f'{name} work': (work, name, 4)
    for name in LAYERS
    if not name.endswith('ties')
  },
}


if __name__ == '__main__':
  print(json.dumps({n: CASES[n][0](*CASES[n][1:]) for n in sys.argv[1:]}))
