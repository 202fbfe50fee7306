"""Lists those cases of `aot_cases` that choose tokens and attend to them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.index_candidates import index_candidates
from pallas_kernels.index_candidates import shapes as candidates_shapes
from pallas_kernels.indexer import indexer
from pallas_kernels.sparse_gqa import sparse_gqa
from pallas_kernels.sparse_mla import ChosenKeys, attend, shares, sparse_mla

BF, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
FP8 = jnp.float8_e4m3fn


class KernelCase(NamedTuple):
  """Holds a function of arrays with its (shape, dtype) arguments."""

  fn: Callable
  args: tuple
  wgmma: bool  # the kernel must contain tensor-core instructions


def gradients(fn: Callable, count: int) -> Callable:
  """Returns (grad, *args) -> the gradients of the first `count` of args."""

  def grads(grad: jax.Array, *args: jax.Array) -> tuple:
    return jax.vjp(lambda *a: fn(*a, *args[count:]), *args[:count])[1](grad)

  return grads


def _indexer(
  batch: int, queries: int, keys: int, float8: bool = False
) -> KernelCase:
  """Builds the choice of 2048 keys by 64 index heads."""
  dtype = FP8 if float8 else BF
  args = (
    ((batch, queries, 64, 128), dtype),
    ((batch, keys, 128), dtype),
    ((batch, queries, 64), F32),
    ((batch, queries), I32),
    ((batch, queries), I32),
  )
  fn = functools.partial(indexer, top_k=2048, impl='gpu')
  if not float8:
    return KernelCase(fn, args, True)

  def scaled(*arrays: jax.Array) -> jax.Array:
    *arrays, q_scale, k_scale = arrays
    return fn(*arrays, q_scale=q_scale, k_scale=k_scale)

  scales = ((batch, queries, 64), F32), ((batch, keys), F32)
  return KernelCase(scaled, (*args, *scales), True)


def _index_candidates(name: str) -> KernelCase:
  """Builds the choice of one of the benchmark shapes."""
  B, T, S, H, size, count, top_k, _ = candidates_shapes.BENCH[name]
  args = (
    ((B, T, H, 128), BF),
    ((B, S, 128), BF),
    ((B, T, H), F32),
    ((B, T, count), I32),
    ((B, T), I32),
  )
  how = {'size': size, 'top_k': top_k, 'impl': 'gpu'}
  return KernelCase(functools.partial(index_candidates, **how), args, True)


def _sparse_mla(queries: int, heads: int, backward: bool) -> KernelCase:
  """Builds attention to 2048 of 4096 latents, or its gradients."""
  args = (
    ((1, queries, heads, 512), BF),
    ((1, queries, heads, 64), BF),
    ((1, 4096, 512), BF),
    ((1, 4096, 64), BF),
    ((1, queries, 2048), I32),
  )
  fn = functools.partial(sparse_mla, scale=0.07, impl='gpu')
  if not backward:
    return KernelCase(fn, args, True)
  return KernelCase(gradients(fn, 4), (args[0], *args), True)


def _shares(queries: int, heads: int) -> KernelCase:
  """Builds the shares of 2048 of 4096 latents in all heads' attention."""
  *floats, index = _sparse_mla(queries, heads, False).args

  def fn(q_c: jax.Array, q_r: jax.Array, *rest: jax.Array) -> jax.Array:
    *keys, log_sum = rest
    how = {'scale': 0.07, 'impl': 'gpu'}
    return shares(q_c, q_r, ChosenKeys(*keys), log_sum, **how)

  log_sum = (1, queries, heads), F32
  return KernelCase(fn, (*floats, index, log_sum), True)


def _shares_of_entries(queries: int) -> KernelCase:
  """Builds the same for V4: 512 of 1024 entries, without a rotary part."""

  def fn(q: jax.Array, *rest: jax.Array) -> jax.Array:
    c, index, log_sum = rest
    how = {'scale': 0.07, 'impl': 'gpu'}
    return shares(q, None, ChosenKeys(c, None, index), log_sum, **how)

  q, entries = ((1, queries, 128, 512), BF), ((1, 1024, 512), BF)
  rest = ((1, queries, 512), I32), ((1, queries, 128), F32)
  return KernelCase(fn, (q, entries, *rest), True)


def _attend(
  queries: int, keys: tuple[tuple[int, int], ...], backward: bool
) -> KernelCase:
  """Builds V4's attention: lists of (entries, chosen) of width 512, sinks."""
  lists = [(((1, S, 512), BF), ((1, queries, K), I32)) for S, K in keys]
  q, sinks = ((1, queries, 128, 512), BF), ((128,), F32)

  def fn(q: jax.Array, sinks: jax.Array, *rest: jax.Array) -> jax.Array:
    given = zip(rest[: len(keys)], rest[len(keys) :])
    chosen = tuple(ChosenKeys(c, None, index) for c, index in given)
    how = {'scale': 0.07, 'sinks': sinks, 'impl': 'gpu'}
    return attend(q, None, chosen, **how)[0]

  args = q, sinks, *(c for c, _ in lists), *(index for _, index in lists)
  if not backward:
    return KernelCase(fn, args, True)
  return KernelCase(gradients(fn, 2 + len(keys)), (q, *args), True)


def _sparse_gqa(queries: int, backward: bool) -> KernelCase:
  """Builds NSA's attention to 16 selected blocks of 64 tokens of 4096."""
  args = (
    ((1, queries, 4, 16, 192), BF),
    ((1, 4096, 4, 192), BF),
    ((1, 4096, 4, 128), BF),
    ((1, queries, 4, 1024), I32),
  )
  fn = functools.partial(sparse_gqa, scale=0.07, impl='gpu')
  if not backward:
    return KernelCase(fn, args, True)
  grad = (1, queries, 4, 16, 128), BF
  return KernelCase(gradients(fn, 3), (grad, *args), True)


CASES = {
  'indexer': _indexer(1, 8192, 8192),
  'indexer_far': _indexer(128, 2, 65536),
  'indexer_shared': _indexer(1, 2, 131_072),
  'indexer_fp8': _indexer(1, 8192, 8192, float8=True),
  'indexer_fp8_far': _indexer(128, 2, 65536, float8=True),
  'indexer_fp8_shared': _indexer(1, 2, 131_072, float8=True),
  **{
    f'index_candidates_{n}': _index_candidates(n)
    for n in candidates_shapes.BENCH
  },
  'sparse_mla': _sparse_mla(4096, 128, False),
  'sparse_mla_decode': _sparse_mla(4, 128, False),
  'sparse_mla_bwd': _sparse_mla(64, 128, True),
  'attention_shares': _shares(4096, 128),
  'attention_shares_v4': _shares_of_entries(4096),
  # V4: a window of 128 tokens and 512 of the entries, in one softmax.
  'sparse_mla_v4': _attend(4096, ((4096, 128), (1024, 512)), False),
  'sparse_mla_v4_bwd': _attend(64, ((4096, 128), (1024, 512)), True),
  'sparse_gqa': _sparse_gqa(1024, False),
  'sparse_gqa_bwd': _sparse_gqa(16, True),
}
