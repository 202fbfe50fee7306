"""Lists the kernels of small models shaped as published ones, mesh by mesh.

python -m tests.model.kernels_mesh_worker choices|numbers NAME MESH ...

NAME is v3, v32, v32_blocks, v4 or nsa.

'numbers' compares the references of the operations, called on every device for
its shard as a kernel would be, with the layers' own code on whole arrays.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as ds
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import ComputeConfig, Kind
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan import kernel_choices
from deepseek_jax.plan.compiled import Program, parse_mesh
from tests import tiny
from tests.infer import families

# Heads of DeepSeek-V3: C = 512, R = 64, 192 key and 128 value dims.
LATENT = (8, None, 512, 128, 64, 128)
# V4's head, and NSA's keys and values.
SHARED = SharedKVConfig(
  heads=8,
  head_dim=512,
  rope_dim=64,
  q_rank=64,
  groups=2,
  o_rank=64,
  window=64,
  csa=CSAConfig(ratio=4, top_k=16, index_heads=16, index_dim=128),
  hca=HCAConfig(ratio=32),
)
NSA = NSAConfig(
  heads=32, kv_heads=2, qk_dim=192, v_dim=128, select=4, window=64
)


def plain(name: str) -> ds.TransformerConfig:
  """Returns layers of V4 or NSA, without experts."""
  kind = lambda far: Kind('ffn', (('attention.compress', far),))
  kinds = {far: kind(far) for far in ('none', 'csa', 'hca')}
  more = {'kinds': kinds, 'residual': HyperConnectionsConfig()}
  blocks, attention = ('none', 'csa', 'hca'), SHARED
  if name == 'nsa':
    more, blocks, attention = {}, ('dense',), NSA
  return ds.TransformerConfig(
    vocab_size=64,
    dim=1024,
    layout=((blocks, 1),),
    attention=attention,
    ffn=FFNConfig(256),
    compute=ComputeConfig(dtype='bfloat16'),
    **more,
  )


def config(name: str) -> ds.TransformerConfig:
  """Returns the widths that the kernels take, and few of everything else."""
  if name in ('v4', 'nsa'):
    return plain(name)
  attention = MLAConfig(*LATENT)
  if name == 'v32':
    attention = DSAConfig(*LATENT, indexer=IndexerConfig(16, 128), top_k=64)
  if name == 'v32_blocks':
    blocks = IndexBlocksConfig(32, 4)
    indexer = IndexerConfig(16, 128, blocks=blocks)
    attention = DSAConfig(*LATENT, indexer=indexer, top_k=64)
  return ds.TransformerConfig(
    vocab_size=64,
    dim=512,
    layout=((('moe',), 1),),
    attention=attention,
    moe=MoEConfig(8, 2, 256, router=RouterConfig(groups=2, top_groups=1)),
    mtp=MTPConfig(0),
    compute=ComputeConfig(dtype='bfloat16'),
  )


def choices(name: str, grids: tuple[str, ...]) -> dict:
  """Returns {mesh: choices}."""
  found = {}
  for grid in grids:
    program = Program(config(name), parse_mesh(grid), 256, 2)
    chosen = kernel_choices.list_here(program, '9.0')
    found[grid] = [dataclasses.asdict(c) for c in chosen]
  return found


def numbers(name: str, grid: MeshConfig, impl: str | None) -> list:
  """Returns logits, gradients and a decoded token's logits on a mesh."""
  plain = small(name)
  compute = dataclasses.replace(plain.compute, kernels=impl)
  model = ds.build(dataclasses.replace(plain, compute=compute))
  variables, tokens = tiny.draw(model), tiny.tokens(4, 16) % 32
  segments = jnp.repeat(jnp.asarray([[1, 2], [1, 1]] * 2), 8, axis=1)
  mesh = meshes.make(grid)

  def loss(params):
    everything = {**variables, 'params': params}
    out = model.apply(everything, tokens, segment_ids=segments, train=True)
    stats = [
      s['attention'].get('loss', 0.0) for p in out.aux['segments'] for s in p
    ]
    extra = sum(jnp.sum(s) for s in stats)
    return (out.logits * jnp.cos(out.logits)).mean() + extra, out.logits

  def decode(variables):
    out = model.apply(variables, tokens[:, :12], cache=model.init_cache(4, 16))
    return model.apply(variables, tokens[:, 12:14], cache=out.cache).logits

  with sharding.use(mesh, grid.rules, grid.exchange):
    grads = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
    out = grads, jax.jit(decode)(variables)
  return [np.asarray(a, np.float64) for a in jax.tree.leaves(out)]


def small(name: str) -> ds.TransformerConfig:
  """Returns a model of a few numbers with the same ideas as `config`."""
  if name in ('v4', 'nsa'):
    return families.config(name)
  if name == 'v4_heads':
    # As many index heads as heads, so that a tensor axis shards both.
    made = families.config('v4')
    csa = dataclasses.replace(made.attention.csa, index_heads=2)
    attention = dataclasses.replace(made.attention, csa=csa)
    return dataclasses.replace(made, attention=attention)
  latent = 4, 12, 16, 8, 4, 6
  attention = MLAConfig(*latent)
  if name == 'v32':
    attention = DSAConfig(*latent, indexer=IndexerConfig(4, 8), top_k=5)
  if name == 'v32_blocks':
    indexer = IndexerConfig(4, 8, blocks=IndexBlocksConfig(2, 4))
    attention = DSAConfig(*latent, indexer=indexer, top_k=5)
  return dataclasses.replace(
    config(name),
    dim=16,
    vocab_size=32,
    attention=attention,
    moe=MoEConfig(4, 2, 8, router=RouterConfig(groups=2, top_groups=1)),
    compute=ComputeConfig(),
  )


def compared(name: str, grids: tuple[str, ...]) -> dict:
  """Returns {mesh: largest error of the operations' references}."""
  found = {}
  for grid in map(parse_mesh, grids):
    own, other = (numbers(name, grid, impl) for impl in (None, 'reference'))
    errors = [
      float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9))
      for a, b in zip(own, other, strict=True)
    ]
    found[grid.spread] = tiny.largest(errors)
  return found


if __name__ == '__main__':
  _what, _name, *_grids = sys.argv[1:]
  _do = {'choices': choices, 'numbers': compared}[_what]
  print(json.dumps(_do(_name, tuple(_grids))))
