"""Like aot_cases, for what serves and selects cached latents."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import latent_kv
from pallas_kernels.aot_case import Case
from pallas_kernels.indexer import indexer
from pallas_kernels.latent_kv import shapes as latent_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.sparse_mla import sparse_mla

BF, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
FP8 = jnp.float8_e4m3fn


def _latent_kv(name):
  shape = latent_shapes.BENCH[name]
  N, D, size = shape.tokens, shape.dim, (shape.pages, shape.page)
  angles = ((N, 32), F32)
  given = (((N, D), BF), ((D, 576), BF), ((512,), F32), angles, angles)
  latent, key = ((*size, 512), FP8 if shape.fp8 else BF), ((*size, 64), BF)
  cache = (latent, ((*size, 4), F32), key) if shape.fp8 else (latent, key)
  kind = latent_kv.FP8Pages if shape.fp8 else latent_kv.Pages
  fn = lambda *a: latent_kv.latent_kv(*a[:6], kind(*a[6:]), impl='gpu')
  # Of two in a process the second finds the first one's product compiled.
  return Case(fn, (*given, ((N,), I32), *cache), name != 'decode_b128_fp8')


def _decode_fp8(batch, new, heads, splits):
  args = (
    ((batch, new, heads, 512), BF),
    ((batch, new, heads, 64), BF),
    ((batch * 64, 64, 512), FP8),
    ((batch * 64, 64, 64), BF),
    ((batch, 64), I32),
    ((batch,), I32),
    ((batch * 64, 64, 4), F32),
  )
  fn = lambda *a: mla_decode(
    *a[:6], scale=0.07, scales=a[6], splits=splits, impl='gpu'
  )
  return Case(fn, args, True)


def _indexer(batch, queries, keys):
  args = (
    ((batch, queries, 64, 128), BF),
    ((batch, keys, 128), BF),
    ((batch, queries, 64), F32),
    ((batch, queries), I32),
    ((batch, queries), I32),
  )
  fn = functools.partial(indexer, top_k=2048, impl='gpu')
  return Case(fn, args, True)


def _sparse_mla(queries, heads, backward):
  args = (
    ((1, queries, heads, 512), BF),
    ((1, queries, heads, 64), BF),
    ((1, 4096, 512), BF),
    ((1, 4096, 64), BF),
    ((1, queries, 2048), I32),
  )
  fn = functools.partial(sparse_mla, scale=0.07, impl='gpu')
  if not backward:
    return Case(fn, args, True)

  def grads(*args):
    *floats, index, grad = args
    return jax.vjp(lambda *a: fn(*a, index), *floats)[1](grad)

  return Case(grads, (*args, args[0]), True)


CASES = {
  **{f'latent_kv_{n}': _latent_kv(n) for n in latent_shapes.BENCH},
  'indexer': _indexer(1, 8192, 8192),
  'indexer_far': _indexer(64, 2, 65536),
  'mla_decode_fp8_h128': _decode_fp8(128, 1, 128, 1),
  'mla_decode_fp8_h16_split4': _decode_fp8(4, 2, 16, 4),
  'sparse_mla': _sparse_mla(4096, 128, False),
  'sparse_mla_bwd': _sparse_mla(64, 128, True),
}
