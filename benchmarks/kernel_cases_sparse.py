"""Like kernel_cases, for what serves and selects cached latents."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.kernel_work import (
  Work,
  bf16,
  fresh_keys,
  in_float32,
  nbytes,
)
from pallas_kernels import latent_kv
from pallas_kernels.compress import compress
from pallas_kernels.compress import shapes as compress_shapes
from pallas_kernels.index_candidates import index_candidates
from pallas_kernels.index_candidates import shapes as candidates_shapes
from pallas_kernels.indexer import indexer
from pallas_kernels.indexer import shapes as indexer_shapes
from pallas_kernels.latent_kv import shapes as latent_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.sparse_gqa import shapes as gqa_shapes
from pallas_kernels.sparse_gqa import sparse_gqa
from pallas_kernels.sparse_mla import ChosenKeys, attend, shares
from pallas_kernels.sparse_mla import shapes as sparse_shapes


def store(shape):
  """Latents of tokens into a cache of zeros."""
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

  args = (x, w, gain, jnp.cos(angles), jnp.sin(angles), slots, cache)
  xla = functools.partial(write, impl='reference')
  moved = nbytes(x, w) + N * (656 if shape.fp8 else 1152)
  flops = 2.0 * N * D * 576
  # The product is summed in another order, so a few codes go a step further.
  tolerance = 2.0**-5 if shape.fp8 else 2.0**-6
  return Work(
    write, args, xla, flops, moved, {}, in_place=write, tolerance=tolerance
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
  flops = 2.0 * pairs * H * 128
  return Work(op, args, xla, flops, moved, {'xla': xla}, tolerance=0.0)


def select_fp8(shape):
  bf = select(shape)
  q, keys, w, *span = bf.args
  # Scales of powers of two leave scores exact.
  k = fresh_keys(2)
  power = lambda key, shape: 2.0 ** jax.random.randint(key, shape, -3, 4)
  q_scale, k_scale = power(k[0], q.shape[:3]), power(k[1], keys.shape[:2])
  q, keys = (a.astype(jnp.float8_e4m3fn) for a in (q, keys))

  def op(*args, impl=None):
    *args, q_scale, k_scale = args
    scales = {'q_scale': q_scale, 'k_scale': k_scale}
    return indexer(*args, top_k=shape.top_k, **scales, impl=impl)

  xla = functools.partial(op, impl='reference')
  args = (q, keys, w, *span, q_scale, k_scale)
  # Half the bytes of both, and the scales.
  moved = bf.moved - nbytes(q, keys) + nbytes(q_scale, k_scale)
  return Work(
    op, args, xla, bf.flops, moved, {'xla': xla}, speedup=2.0, tolerance=0.0
  )


def select_small(shape):
  return shape._replace(batch=1, queries=9, keys=700, heads=16, top_k=60)


def select_in_blocks(shape):
  q, keys, w, _, last = select(shape).args
  B, T, S = shape.batch, shape.queries, shape.keys
  # Any blocks of the keys before the queries, and a query's own.
  before = max(shape.count - 1, (S - T) // shape.size)
  drawn = _picked(fresh_keys(1)[0], B * T, before, shape.count - 1)
  own = (last - 1) // shape.size
  drawn = drawn.reshape(B, T, -1)
  number = jnp.concatenate([drawn, own[..., None]], axis=-1)
  args = (q, keys, w, number * shape.size, last)
  how = {'size': shape.size, 'top_k': shape.top_k}
  op = functools.partial(index_candidates, **how)
  xla = functools.partial(op, impl='reference')
  pairs = B * T * shape.count * shape.size
  moved = nbytes(q, keys, w, number) + B * T * shape.top_k * 4
  flops = 2.0 * pairs * shape.heads * 128
  return Work(op, args, xla, flops, moved, {'xla': xla}, tolerance=0.0)


def select_in_blocks_small(shape):
  few = {'heads': 16, 'size': 64, 'count': 5, 'top_k': 60}
  return shape._replace(batch=1, queries=9, keys=700, **few)


def _picked(key, rows, among, count):
  """Positions [rows count], ascending, no two of a row alike."""
  one = lambda key: jax.lax.top_k(jax.random.uniform(key, (among,)), count)[1]
  index = jax.lax.map(one, jax.random.split(key, rows), batch_size=64)
  return jnp.sort(index, axis=-1).astype(jnp.int32)


def _chosen(shape):
  """Floats and choices of attend, gradient of the output, scored pairs."""
  (B, T), H, C, R = shape[:2], shape.heads, shape.width, shape.rope
  k = iter(fresh_keys(9))
  rope = lambda *size: bf16(next(k), *size, R) if R else None
  latents, indices, pairs = [], [], 0
  for S, K in filter(None, ((shape.keys, shape.top_k), shape.far)):
    indices.append(_picked(next(k), B * T, S, K).reshape(B, T, K))
    latents.append((bf16(next(k), B, S, C), rope(B, S)))
    pairs += B * T * H * K
  sinks = jax.random.normal(next(k), (H,)) if shape.sinks else None
  floats = bf16(next(k), B, T, H, C), rope(B, T, H), latents, sinks
  return floats, indices, bf16(next(k), B, T, H, C), pairs


def _attend(floats, indices, impl):
  q_c, q_r, latents, sinks = floats
  keys = tuple(ChosenKeys(*a, index) for a, index in zip(latents, indices))
  how = {'scale': 192**-0.5, 'sinks': sinks, 'impl': impl}
  return attend(q_c, q_r, keys, **how)[0]


def sparse(shape):
  floats, indices, grad, pairs = _chosen(shape)
  xla = functools.partial(_attend, impl='reference')
  moved = nbytes(*jax.tree.leaves((floats, indices)), grad)
  each = 2.0 * (2 * shape.width + shape.rope)
  args = floats, indices
  exact = in_float32(_attend)
  return Work(_attend, args, exact, pairs * each, moved, {'xla': xla})


def sparse_bwd(shape):
  floats, indices, grad, pairs = _chosen(shape)

  def op(floats, indices, grad, impl):
    fn = lambda floats: _attend(floats, indices, impl)
    return jax.vjp(fn, floats)[1](grad)[0]

  xla = functools.partial(op, impl='reference')
  # Forward; scores again, dp, then dq, and two sums for the latent.
  each = 2.0 * (7 * shape.width + 4 * shape.rope)
  moved = 3 * nbytes(*jax.tree.leaves((floats, indices)))
  args = floats, indices, grad
  return Work(op, args, in_float32(op), pairs * each, moved, {'xla': xla})


def teach(shape):
  """The indexer's target: how all heads share out what they attend to."""
  (*queries, latents, sinks), indices, _, pairs = _chosen(shape)
  keys = tuple(ChosenKeys(*a, i) for a, i in zip(latents, indices))
  how = {'scale': 192**-0.5, 'sinks': sinks, 'impl': 'reference'}
  _, log_sum = jax.jit(lambda q, keys: attend(*q, keys, **how))(queries, keys)

  def op(queries, keys, log_sum, impl):
    return shares(*queries, keys, log_sum, scale=192**-0.5, impl=impl)

  args = queries, keys[-1], log_sum
  xla = functools.partial(op, impl='reference')
  each = 2.0 * (shape.width + shape.rope)
  moved = nbytes(*jax.tree.leaves(args)) + 4 * indices[-1].size
  own = pairs * indices[-1].shape[-1] / sum(i.shape[-1] for i in indices)
  return Work(op, args, in_float32(op), own * each, moved, {'xla': xla})


def sparse_small(shape):
  far = shape.far and (70, 66)
  small = shape._replace(batch=1, queries=5, keys=300, heads=16, top_k=100)
  return small._replace(far=far)


def grouped(shape):
  """NSA's rows: one choice for the heads of a group."""
  (B, T, S, G, J, M), k = shape[:6], fresh_keys(4)
  index = _picked(k[0], B * T * G, S, M).reshape(B, T, G, M)
  args = (
    bf16(k[1], B, T, G, J, shape.keys),
    bf16(k[2], B, S, G, shape.keys),
    bf16(k[3], B, S, G, shape.values),
  )
  op = lambda *a, impl: sparse_gqa(*a, index, scale=192**-0.5, impl=impl)
  xla = functools.partial(op, impl='reference')
  wide = shape.keys + shape.values
  flops = 2.0 * B * T * G * J * M * wide
  moved = nbytes(*args, index) + B * T * G * J * shape.values * 2
  return Work(op, args, in_float32(op), flops, moved, {'xla': xla})


def grouped_small(shape):
  return shape._replace(batch=1, queries=5, tokens=300, groups=2, chosen=100)


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


def _windows(shape):
  """Projections, gates and bias; the last tokens of windows."""
  k, lasts = fresh_keys(3), compress_shapes.places(shape)
  tokens = max(map(sum, shape.documents)), shape.series, shape.dim
  wide = len(shape.documents), *tokens
  floats = (jax.random.normal(k[i], wide) for i in (0, 1))
  bias = jax.random.normal(k[2], (shape.ratio, *tokens[1:]))
  return (*floats, bias), tuple(map(jnp.asarray, lasts))


def entries(shape):
  floats, lasts = _windows(shape)
  op = lambda *a, impl: compress(*a, *lasts, impl=impl)
  xla = functools.partial(op, impl='reference')
  moved = nbytes(*floats) + lasts[0].size * shape.dim * 4
  return Work(op, floats, xla, 0, moved, {'xla': xla})


def entries_bwd(shape):
  floats, lasts = _windows(shape)
  size = *lasts[0].shape, shape.dim
  grad = jax.random.normal(fresh_keys(1)[0], size)

  def op(*args, impl):
    run = lambda *a: compress(*a, *lasts, impl=impl)
    return jax.vjp(run, *args[:3])[1](args[3])

  xla = functools.partial(op, impl='reference')
  # Forward, then read once more, and the gradients written.
  moved = 3 * nbytes(*floats) + nbytes(grad)
  return Work(op, (*floats, grad), xla, 0, moved, {'xla': xla})


def entries_small(shape):
  return shape._replace(documents=((300, 7), (290,)))


# Where an indexer learns; V4's is of the entries.
_LEARNT = {n: sparse_shapes.BENCH[n] for n in ('prefill_s4096', 'v4_csa_s8192')}

OPS = {
  'latent_kv': (latent_shapes.BENCH, store, store_small),
  'indexer': (indexer_shapes.BENCH, select, select_small),
  'indexer_fp8': (indexer_shapes.BENCH, select_fp8, select_small),
  'index_candidates': (
    candidates_shapes.BENCH,
    select_in_blocks,
    select_in_blocks_small,
  ),
  'compress': (compress_shapes.BENCH, entries, entries_small),
  'compress_bwd': (compress_shapes.BENCH, entries_bwd, entries_small),
  'mla_decode_fp8': (decode_shapes.BENCH, decode_fp8, decode_small),
  'sparse_mla': (sparse_shapes.BENCH, sparse, sparse_small),
  'sparse_mla_bwd': (sparse_shapes.BENCH, sparse_bwd, sparse_small),
  'attention_shares': (_LEARNT, teach, sparse_small),
  'sparse_gqa': (gqa_shapes.BENCH, grouped, grouped_small),
}
