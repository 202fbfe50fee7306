"""Work for benchmarks.kernels: inputs, contenders, FLOPs and bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import (
  kernel_cases_model,
  kernel_cases_sparse,
  kernel_cases_streams,
  kernel_torch,
)
from benchmarks.kernel_work import (
  Work,
  bf16,
  fresh_keys,
  in_float32,
  nbytes,
)
from pallas_kernels import permute
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_fp8,
  grouped_swiglu,
)
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.mla_prefill import shapes as prefill_shapes
from pallas_kernels.permute import shapes as permute_shapes
from pallas_kernels.quantize import quantize, quantize_columns
from pallas_kernels.quantize import shapes as quantize_shapes
from pallas_kernels.router import router
from pallas_kernels.router import shapes as router_shapes
from pallas_kernels.sinkhorn import shapes as sinkhorn_shapes
from pallas_kernels.sinkhorn import sinkhorn
from pallas_kernels.swiglu_quantize import shapes as swiglu_shapes
from pallas_kernels.swiglu_quantize import swiglu_gradient, swiglu_quantize


def _triton_decode(q_c, q_r, c, k_r, table, lengths):
  """jax's decoding in Triton; it knows no pages, so these are copied first."""
  # An example of jax's, on its way out: then the report says so.
  from jax.experimental.pallas.ops.gpu import decode_attention

  if q_c.shape[1] > 1:
    raise NotImplementedError('one new token at a time')
  q = jnp.concatenate([q_c, q_r], axis=-1)[:, 0]
  pages = jnp.concatenate([c, k_r], axis=-1)[table]
  keys = pages.reshape(q.shape[0], -1, q.shape[-1])
  out = decode_attention.mqa(
    q, keys, keys, kv_seq_len=lengths, sm_scale=192**-0.5
  )
  return out[..., :512]


def decode(shape):
  B, J = len(shape.lengths), -(-max(shape.lengths) // shape.page)
  k = fresh_keys(5)
  args = (
    bf16(k[0], B, shape.new, shape.heads, 512),
    bf16(k[1], B, shape.new, shape.heads, 64),
    bf16(k[2], B * J, shape.page, 512),
    bf16(k[3], B * J, shape.page, 64),
    jax.random.permutation(k[4], B * J).reshape(B, J).astype(jnp.int32),
    jnp.asarray(shape.lengths, jnp.int32),
  )
  op = functools.partial(mla_decode, scale=192**-0.5, splits=shape.splits)
  pairs = sum(shape.lengths) * shape.new * shape.heads
  moved = nbytes(args[0], args[1], args[0]) + sum(shape.lengths) * 576 * 2
  xla = functools.partial(op, impl='reference')
  flash_mla = lambda: kernel_torch.flash_mla_us(*args, 192**-0.5)
  return Work(
    op,
    args,
    in_float32(op),
    2 * pairs * 1088,
    moved,
    {'xla': xla, 'triton': _triton_decode},
    {'flash_mla': flash_mla},
  )


def decode_small(shape):
  return shape._replace(lengths=tuple(n % 1000 + 1 for n in shape.lengths[:3]))


def _grouped(shape):
  blocks = [c // shape.block for c in shape.counts]
  E, k = len(blocks), fresh_keys(3)
  rows = bf16(k[0], sum(shape.counts), shape.dim)
  weights = bf16(k[1], E, shape.dim, shape.out)
  grad = bf16(k[2], sum(shape.counts), shape.out)
  expert = jnp.asarray(np.repeat(np.arange(E), blocks), jnp.int32)
  flops = 2.0 * rows.shape[0] * shape.dim * shape.out
  return rows, weights, grad, expert, jnp.asarray(shape.counts), flops


def grouped_fwd(shape):
  rows, weights, grad, expert, counts, flops = _grouped(shape)
  op = lambda r, w, impl: grouped_matmul(r, w, expert, impl=impl)
  ragged = lambda r, w: jax.lax.ragged_dot(r, w, counts)
  moved, args = nbytes(rows, weights, grad), (rows, weights)
  torch = lambda: kernel_torch.grouped_mm_us(*args, counts)
  naive, libraries = {'xla': ragged}, {'torch': torch}
  return Work(op, args, in_float32(op), flops, moved, naive, libraries)


def grouped_bwd(shape):
  rows, weights, grad, expert, counts, flops = _grouped(shape)

  def op(r, w, g, impl):
    fn = lambda r, w: grouped_matmul(r, w, expert, impl=impl)
    return jax.vjp(fn, r, w)[1](g)

  def ragged(r, w, g):
    return jax.vjp(lambda r, w: jax.lax.ragged_dot(r, w, counts), r, w)[1](g)

  args, moved = (rows, weights, grad), 2 * nbytes(rows, weights, grad)
  return Work(op, args, in_float32(op), 2 * flops, moved, {'xla': ragged})


def grouped_swiglu_fwd(shape):
  rows, weights, _, expert, _, flops = _grouped(shape)
  op = lambda r, w, impl: grouped_swiglu(r, w, expert, impl=impl)

  def plain(r, w):
    gate, up = jnp.split(grouped_matmul(r, w, expert, impl='gpu'), 2, axis=1)
    return jax.nn.silu(gate) * up

  moved = nbytes(rows, weights) + rows.shape[0] * shape.out
  naive = {'xla': plain}  # the product by the kernel, the rest by XLA
  return Work(op, (rows, weights), in_float32(op), flops, moved, naive)


def grouped_fp8(shape):
  rows, weights, _, expert, _, flops = _grouped(shape)
  q, row_scales = quantize(rows)
  each = lambda w: quantize(w.T, block=(128, 128), impl='reference')
  args = (q, row_scales, *jax.lax.map(each, weights))
  op = lambda *a, impl: grouped_matmul_fp8(*a, expert, impl=impl)
  bf16_one = lambda *_: grouped_matmul(rows, weights, expert, impl='gpu')
  exact = functools.partial(op, impl='reference')
  moved = nbytes(*args) + 2 * rows.shape[0] * shape.out
  naive = {'xla': bf16_one}
  return Work(op, args, exact, flops, moved, naive, speedup=2.0)


def grouped_float8_bwd(shape):
  rows, weights, grad, expert, _, flops = _grouped(shape)

  def op(r, w, g, impl, float8=True):
    fn = lambda r, w: grouped_matmul(r, w, expert, float8=float8, impl=impl)
    return jax.vjp(fn, r, w)[1](g)

  args, moved = (rows, weights, grad), 2 * nbytes(rows, weights, grad)
  exact = functools.partial(op, impl='reference')
  naive = {'xla': functools.partial(op, impl='gpu', float8=False)}
  return Work(op, args, exact, 2 * flops, moved, naive, speedup=2.0)


def grouped_small(shape):
  return shape._replace(
    counts=(2 * shape.block, 0, shape.block), dim=512, out=512
  )


def _layout(shape):
  k = fresh_keys(4)
  size = (shape.tokens, shape.choices)
  experts = jax.random.randint(k[0], size, 0, shape.experts)
  plan = permute.plan(experts, shape.experts, block=shape.block)
  x = bf16(k[1], shape.tokens, shape.dim)
  rows = bf16(k[2], plan.source.shape[0], shape.dim)
  return plan, x, rows, jax.random.uniform(k[3], size)


def gather(shape):
  plan, x, rows, _ = _layout(shape)
  op = lambda x, impl: permute.permute(x, plan, impl=impl)
  naive = lambda x: jnp.take(
    x, plan.source // shape.choices, axis=0, mode='fill', fill_value=0
  )
  return Work(op, (x,), in_float32(op), 0, nbytes(x, rows), {'xla': naive})


def gather_fp8(shape):
  plan, x, rows, _ = _layout(shape)
  op = lambda x, impl: permute.permute_fp8(x, plan, impl=impl)
  xla = functools.partial(op, impl='reference')
  moved = nbytes(x) + rows.size * (1 + 4 / 128)
  return Work(op, (x,), xla, 0, moved, {'xla': xla})


def combine(shape):
  plan, x, rows, weights = _layout(shape)
  op = lambda r, w, impl: permute.combine(r, w, plan, impl=impl)
  naive = lambda r, w: jnp.einsum('NKD,NK->ND', r[plan.slot], w)
  read = plan.slot.size * shape.dim * 2
  moved = read + nbytes(x, weights)
  return Work(op, (rows, weights), in_float32(op), 0, moved, {'xla': naive})


def gather_bwd(shape):
  plan, x, rows, _ = _layout(shape)

  def op(grad, impl):
    fn = lambda x: permute.permute(x, plan, impl=impl)
    return jax.vjp(fn, jnp.zeros(x.shape, grad.dtype))[1](grad)[0]

  xla = functools.partial(op, impl='reference')
  moved = plan.slot.size * shape.dim * 2 + nbytes(x)
  return Work(op, (rows,), in_float32(op), 0, moved, {'xla': xla})


def combine_bwd(shape):
  plan, x, rows, weights = _layout(shape)

  def op(rows, weights, grad, impl):
    fn = lambda r, w: permute.combine(r, w, plan, impl=impl)
    return jax.vjp(fn, rows, weights)[1](grad)

  xla = functools.partial(op, impl='reference')
  read = plan.slot.size * shape.dim * 2
  moved = read + nbytes(x, rows, weights, weights)
  args = (rows, weights, x)
  return Work(op, args, in_float32(op), 0, moved, {'xla': xla})


def permute_small(shape):
  return shape._replace(tokens=97, experts=16, dim=1024)


def _prefill(shape):
  """q, k, v, gradient, segments and scored pairs of one head."""
  k = fresh_keys(4)
  rows = [np.repeat(np.arange(len(s)), s) for s in shape.segments]
  segments = jnp.asarray(np.stack(rows), jnp.int32)
  size = (*segments.shape, shape.heads)
  wide, narrow = (*size, 192), (*size, 128)
  arrays = (
    bf16(k[0], *wide),
    bf16(k[1], *wide),
    bf16(k[2], *narrow),
    bf16(k[3], *narrow),
  )
  pairs = sum(n * (n + 1) // 2 for row in shape.segments for n in row)
  return arrays, segments, pairs * shape.heads


def _cudnn(q, k, v):
  """cuDNN's causal attention; it knows no packed segments."""
  # Not public, so it may be gone: then the report says so.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  return cudnn.dot_product_attention(
    q, k, v, scale=192**-0.5, mask_type=cudnn.MaskType.CAUSAL
  )


def prefill(shape):
  (q, k, v, _), segments, pairs = _prefill(shape)
  op = lambda *a, impl: mla_prefill(*a, segments, scale=192**-0.5, impl=impl)
  naive = {'xla': functools.partial(op, impl='reference'), 'cudnn': _cudnn}
  moved = nbytes(q, k, v, v)
  return Work(op, (q, k, v), in_float32(op), 2 * pairs * 320, moved, naive)


def prefill_bwd(shape):
  (q, k, v, g), segments, pairs = _prefill(shape)

  def op(q, k, v, g, impl):
    fn = lambda *a: mla_prefill(*a, segments, scale=192**-0.5, impl=impl)
    return jax.vjp(fn, q, k, v)[1](g)

  cudnn = lambda q, k, v, g: jax.vjp(_cudnn, q, k, v)[1](g)
  naive = {'xla': functools.partial(op, impl='reference'), 'cudnn': cudnn}
  # Forward 192 + 128; scores again, dv, dp, dq, dk: 3 * 192 + 2 * 128.
  flops, moved = 2 * pairs * (320 + 832), 3 * nbytes(q, k, v)
  return Work(op, (q, k, v, g), in_float32(op), flops, moved, naive)


def prefill_small(shape):
  return shape._replace(segments=((70, 1, 129),), heads=1)


def route(shape):
  k = fresh_keys(2)
  logits = jax.random.normal(k[0], (shape.tokens, shape.experts))
  bias = jax.random.normal(k[1], (shape.experts,)) / 10 if shape.bias else None
  op = lambda x, impl: router(
    x, bias, top_k=shape.top_k, rule=shape.rule, impl=impl
  )
  xla = functools.partial(op, impl='reference')
  moved = nbytes(logits) + shape.tokens * shape.top_k * 8
  return Work(op, (logits,), xla, 0, moved, {'xla': xla})


def scale_to_fp8(shape):
  x = bf16(fresh_keys(1)[0], shape.rows, shape.columns)
  op = functools.partial(
    quantize, block=shape.block, power_of_two=shape.power_of_two
  )
  xla = functools.partial(op, impl='reference')
  moved, naive = nbytes(x) * 1.5, {'xla': xla}
  return Work(op, (x,), xla, 0, moved, naive)


def turn_to_fp8(shape):
  x = bf16(fresh_keys(1)[0], shape.rows, shape.columns)
  op = functools.partial(quantize_columns, power_of_two=shape.power_of_two)
  xla = functools.partial(op, impl='reference')
  return Work(op, (x,), xla, 0, nbytes(x) * 1.5, {'xla': xla})


def _activated(shape):
  k = fresh_keys(2)
  wide = bf16(k[0], shape.rows, 2 * shape.columns)
  return wide, bf16(k[1], shape.rows, shape.columns)


def activate_to_fp8(shape):
  h, _ = _activated(shape)
  how = {'limit': shape.limit, 'power_of_two': shape.power_of_two}
  op = functools.partial(swiglu_quantize, **how)
  xla = functools.partial(op, impl='reference')
  # Two halves in, half as many bytes of one out.
  moved, naive = nbytes(h) * 1.25, {'xla': xla}
  return Work(op, (h,), xla, 0, moved, naive, tolerance=2.0**-5)


def activate_bwd(shape):
  args = _activated(shape)
  how = {'limit': shape.limit, 'power_of_two': shape.power_of_two}
  op = functools.partial(swiglu_gradient, **how)
  xla = functools.partial(op, impl='reference')
  # In: both halves and the gradient; out: the halves in both formats.
  moved = nbytes(args[0]) * 3
  return Work(op, args, xla, 0, moved, {'xla': xla}, tolerance=2.0**-5)


def mix(shape):
  size = (shape.tokens, shape.streams, shape.streams)
  logits = jax.random.normal(fresh_keys(1)[0], size)
  op = functools.partial(sinkhorn, iterations=shape.iterations)
  xla = functools.partial(op, impl='reference')
  return Work(op, (logits,), xla, 0, 2 * nbytes(logits), {'xla': xla})


def mix_bwd(shape):
  k = fresh_keys(2)
  size = (shape.tokens, shape.streams, shape.streams)
  args = jax.random.normal(k[0], size), jax.random.normal(k[1], size)

  def op(logits, grad, impl):
    fn = functools.partial(sinkhorn, iterations=shape.iterations, impl=impl)
    return jax.vjp(fn, logits)[1](grad)[0]

  xla = functools.partial(op, impl='reference')
  return Work(op, args, xla, 0, 3 * nbytes(args[0]), {'xla': xla})


# The gradient of float8 weights takes blocks of 128 rows.
_WIDE = {n: s for n, s in grouped_shapes.BENCH.items() if s.block == 128}

swiglu_small = lambda s: s._replace(rows=150, columns=256)

# op: (shapes, work on a shape, a shape small enough to check).
OPS = {
  'mla_decode': (decode_shapes.BENCH, decode, decode_small),
  'mla_prefill': (prefill_shapes.BENCH, prefill, prefill_small),
  'mla_prefill_bwd': (prefill_shapes.BENCH, prefill_bwd, prefill_small),
  'grouped_matmul': (grouped_shapes.BENCH, grouped_fwd, grouped_small),
  'grouped_matmul_bwd': (grouped_shapes.BENCH, grouped_bwd, grouped_small),
  'grouped_swiglu': (grouped_shapes.BENCH, grouped_swiglu_fwd, grouped_small),
  'grouped_matmul_fp8': (grouped_shapes.BENCH, grouped_fp8, grouped_small),
  'grouped_matmul_float8_bwd': (_WIDE, grouped_float8_bwd, grouped_small),
  'permute': (permute_shapes.BENCH, gather, permute_small),
  'permute_fp8': (permute_shapes.BENCH, gather_fp8, permute_small),
  'permute_bwd': (permute_shapes.BENCH, gather_bwd, permute_small),
  'combine': (permute_shapes.BENCH, combine, permute_small),
  'combine_bwd': (permute_shapes.BENCH, combine_bwd, permute_small),
  'router': (router_shapes.BENCH, route, lambda s: s._replace(tokens=150)),
  'quantize': (
    quantize_shapes.BENCH,
    scale_to_fp8,
    lambda s: s._replace(rows=256, columns=256),
  ),
  'quantize_columns': (
    quantize_shapes.BENCH_COLUMNS,
    turn_to_fp8,
    lambda s: s._replace(rows=256, columns=256),
  ),
  'swiglu_quantize': (swiglu_shapes.BENCH, activate_to_fp8, swiglu_small),
  'swiglu_gradient': (swiglu_shapes.BENCH, activate_bwd, swiglu_small),
  'sinkhorn': (
    sinkhorn_shapes.BENCH,
    mix,
    lambda s: s._replace(tokens=150),
  ),
  'sinkhorn_bwd': (
    sinkhorn_shapes.BENCH,
    mix_bwd,
    lambda s: s._replace(tokens=150),
  ),
  **kernel_cases_sparse.OPS,
  **kernel_cases_streams.OPS,
  **kernel_cases_model.OPS,
}
