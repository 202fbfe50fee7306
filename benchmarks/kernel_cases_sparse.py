"""Like kernel_cases, for what serves and selects cached latents."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.kernel_work import (
  ONE_CODE,
  Work,
  bf16,
  fresh_keys,
  in_float32,
  nbytes,
)
from pallas_kernels import latent_kv
from pallas_kernels.indexer import indexer
from pallas_kernels.indexer import shapes as indexer_shapes
from pallas_kernels.latent_kv import shapes as latent_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.quantize import dequantize
from pallas_kernels.sparse_mla import shapes as sparse_shapes
from pallas_kernels.sparse_mla import sparse_mla


def store(shape):
  """Latents of tokens into a cache of zeros, read back as numbers."""
  N, D, pages = shape.tokens, shape.dim, (shape.pages, shape.page)
  k = fresh_keys(6)
  x, w = bf16(k[0], N, D), bf16(k[1], D, 576)
  gain = jax.random.uniform(k[2], (512,))
  angles = jax.random.uniform(k[3], (N, 32), maxval=6.28)
  slots = jax.random.permutation(k[4], shape.pages * shape.page)[:N]
  zeros = lambda n, dtype=jnp.bfloat16: jnp.zeros((*pages, n), dtype)
  cache = latent_kv.Pages(zeros(512), zeros(64))
  write = latent_kv.latent_kv
  if shape.fp8:
    c = zeros(512, jnp.float8_e4m3fn)
    cache = latent_kv.FP8Pages(c, zeros(4, jnp.float32), zeros(64))

  def op(x, w, gain, cos, sin, slots, cache, impl):
    new = write(x, w, gain, cos, sin, slots, cache, impl=impl)
    if not shape.fp8:
      return new
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return dequantize(flat(new.c), flat(new.scales)), new.k_r

  args = (x, w, gain, jnp.cos(angles), jnp.sin(angles), slots, cache)
  xla = functools.partial(op, impl='reference')
  moved = nbytes(x, w) + N * (656 if shape.fp8 else 1152)
  flops = 2.0 * N * D * 576
  tolerance = ONE_CODE if shape.fp8 else 2.0**-6
  return Work(
    op, args, xla, flops, moved, {}, in_place=write, tolerance=tolerance
  )


def store_small(shape):
  return shape._replace(tokens=90, dim=512, pages=3)


def select(shape):
  B, T, S, H = shape.batch, shape.queries, shape.keys, shape.heads
  k = fresh_keys(3)
  # Small integers: scores are exact, so the choice has one right answer.
  whole = lambda key, *s: jax.random.randint(key, s, -2, 3).astype(jnp.bfloat16)
  q, keys = whole(k[0], B, T, H, 128), whole(k[1], B, S, 128)
  w = whole(k[2], B, T, H).astype(jnp.float32)
  last = jnp.broadcast_to(jnp.arange(S - T, S, dtype=jnp.int32) + 1, (B, T))
  args = (q, keys, w, jnp.zeros_like(last), last)
  op = functools.partial(indexer, top_k=shape.top_k)
  xla = functools.partial(op, impl='reference')
  pairs = B * (T * (S - T) + T * (T + 1) // 2)
  moved = nbytes(q, keys, w) + B * T * shape.top_k * 4
  return Work(op, args, xla, 2.0 * pairs * H * 128, moved, {'xla': xla})


def select_small(shape):
  return shape._replace(batch=1, queries=9, keys=700, heads=16, top_k=60)


def _chosen(shape):
  """Arguments of sparse_mla and of its gradient, and scored pairs."""
  B, T, S, H = shape.batch, shape.queries, shape.keys, shape.heads
  k = fresh_keys(6)
  scores = jax.random.uniform(k[0], (B, T, S))
  index = jax.lax.map(
    lambda row: jax.lax.top_k(row, shape.top_k)[1], scores.reshape(B * T, S)
  )
  index = jnp.sort(index, axis=-1).reshape(B, T, -1).astype(jnp.int32)
  args = (
    bf16(k[1], B, T, H, 512),
    bf16(k[2], B, T, H, 64),
    bf16(k[3], B, S, 512),
    bf16(k[4], B, S, 64),
  )
  return args, index, bf16(k[5], B, T, H, 512), B * T * H * shape.top_k


def sparse(shape):
  args, index, _, pairs = _chosen(shape)
  op = lambda *a, impl: sparse_mla(*a, index, scale=192**-0.5, impl=impl)
  xla = functools.partial(op, impl='reference')
  moved = nbytes(*args, args[0], index)
  return Work(op, args, in_float32(op), 2.0 * pairs * 1088, moved, {'xla': xla})


def sparse_bwd(shape):
  args, index, grad, pairs = _chosen(shape)

  def op(*args, impl):
    *args, grad = args
    fn = lambda *a: sparse_mla(*a, index, scale=192**-0.5, impl=impl)
    return jax.vjp(fn, *args)[1](grad)

  xla = functools.partial(op, impl='reference')
  # Forward 1088; scores again, dp, then dq, and two sums for the latent.
  flops, moved = 2.0 * pairs * (1088 + 2752), 3 * nbytes(*args, index)
  args = (*args, grad)
  return Work(op, args, in_float32(op), flops, moved, {'xla': xla})


def sparse_small(shape):
  return shape._replace(batch=1, queries=5, keys=300, heads=16, top_k=100)


def decode_fp8(shape):
  """mla_decode's shapes with float8 latents: 656 bytes a token."""
  B, J = len(shape.lengths), -(-max(shape.lengths) // shape.page)
  k = fresh_keys(6)
  c, pages = bf16(k[2], B * J, shape.page, 512), (B * J, shape.page)
  args = (
    bf16(k[0], B, shape.new, shape.heads, 512),
    bf16(k[1], B, shape.new, shape.heads, 64),
    c.astype(jnp.float8_e4m3fn),
    bf16(k[3], *pages, 64),
    jax.random.permutation(k[4], B * J).reshape(B, J).astype(jnp.int32),
    jnp.asarray(shape.lengths, jnp.int32),
    jax.random.uniform(k[5], (*pages, 4)),
  )

  def op(*args, impl):
    *args, scales = args
    how = {'scale': 192**-0.5, 'scales': scales, 'splits': shape.splits}
    return mla_decode(*args, **how, impl=impl)

  tokens = sum(shape.lengths)
  flops = 2.0 * tokens * shape.new * shape.heads * 1088
  moved = nbytes(args[0], args[1], args[0]) + tokens * 656
  xla = functools.partial(op, impl='reference')
  return Work(op, args, in_float32(op), flops, moved, {'xla': xla})


def decode_small(shape):
  return shape._replace(lengths=tuple(n % 1000 + 1 for n in shape.lengths[:3]))


OPS = {
  'latent_kv': (latent_shapes.BENCH, store, store_small),
  'indexer': (indexer_shapes.BENCH, select, select_small),
  'mla_decode_fp8': (decode_shapes.BENCH, decode_fp8, decode_small),
  'sparse_mla': (sparse_shapes.BENCH, sparse, sparse_small),
  'sparse_mla_bwd': (sparse_shapes.BENCH, sparse_bwd, sparse_small),
}
