"""The kernels and shapes that are compiled ahead of time and exported."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import aot_cases_sparse, permute
from pallas_kernels.aot_case import Case
from pallas_kernels.grouped_matmul import fp8 as grouped_fp8
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_fp8,
  grouped_swiglu,
)
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.permute.reference import num_blocks
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize import shapes as quantize_shapes
from pallas_kernels.router import router
from pallas_kernels.router import shapes as router_shapes
from pallas_kernels.sinkhorn import sinkhorn


def _mla_decode(batch, new, heads, splits):
  bf, i32 = jnp.bfloat16, jnp.int32
  args = (
    ((batch, new, heads, 512), bf),
    ((batch, new, heads, 64), bf),
    ((batch * 64, 64, 512), bf),
    ((batch * 64, 64, 64), bf),
    ((batch, 64), i32),
    ((batch,), i32),
  )
  fn = functools.partial(mla_decode, scale=0.07, splits=splits, impl='gpu')
  return Case(fn, args, True)


def _permute(name, tokens, choices, experts, dim):
  """One direction of the layout of V3's experts."""
  bf, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
  M = num_blocks(tokens * choices, experts, 128) * 128
  plan = (
    ((tokens, choices), i32),
    ((M,), i32),
    ((M // 128,), i32),
    ((experts,), i32),
  )
  x, rows = ((tokens, dim), bf), ((M, dim), bf)
  weights = ((tokens, choices), f32)
  arrays = {
    'permute': (x,),
    'permute_fp8': (x,),
    'permute_bwd': (rows,),
    'combine': (rows, weights),
    'combine_bwd': (rows, weights, x),
  }[name]

  def fn(*args):
    given, layout = args[: len(arrays)], permute.Plan(*args[len(arrays) :])
    if name == 'permute':
      return permute.permute(*given, layout, impl='gpu')
    if name == 'permute_fp8':
      return permute.permute_fp8(*given, layout, impl='gpu')
    if name == 'combine':
      return permute.combine(*given, layout, impl='gpu')
    if name == 'permute_bwd':
      x = jnp.zeros((tokens, dim), bf)
      return jax.vjp(lambda x: permute.permute(x, layout, impl='gpu'), x)[1](
        *given
      )
    return jax.vjp(
      lambda r, w: permute.combine(r, w, layout, impl='gpu'), *given[:2]
    )[1](given[2])

  return Case(fn, (*arrays, *plan), False)


def _grouped(counts, dim, out, block, kind):
  """One product: 'fwd', 'dlhs' (transposed) or 'drhs'."""
  bf, i32 = jnp.bfloat16, jnp.int32
  E, M = len(counts), sum(counts)
  layout = (((M // block,), i32), ((), i32))
  rows, grads, weights = ((M, dim), bf), ((M, out), bf), ((E, dim, out), bf)
  if kind == 'drhs':
    fn = lambda x, g, be, used: grouped_gpu.outer(x, g, be, used, E)
    return Case(fn, (rows, grads, *layout), True)
  given = rows if kind == 'fwd' else grads
  fn = lambda x, w, be, used: grouped_matmul(
    x, w, be, used=used, transpose=kind == 'dlhs', impl='gpu'
  )
  return Case(fn, (given, weights, *layout), True)


def _grouped_swiglu(counts, dim, out, block):
  bf, i32 = jnp.bfloat16, jnp.int32
  E, M = len(counts), sum(counts)
  layout = (((M // block,), i32), ((), i32))
  fn = lambda x, w, be, used: grouped_swiglu(x, w, be, used=used, impl='gpu')
  return Case(fn, (((M, dim), bf), ((E, dim, 2 * out), bf), *layout), True)


def _grouped_fp8(counts, dim, out, block, kind):
  """'fwd', or 'drhs' of turned rows and gradients."""
  f8, f32, i32 = jnp.float8_e4m3fn, jnp.float32, jnp.int32
  E, M = len(counts), sum(counts)
  layout = (((M // block,), i32), ((), i32))
  by_row = lambda n, m: (((n, m), f8), ((n, m // 128), f32))
  if kind == 'drhs':
    fn = lambda *a: grouped_fp8.outer(*a, E, jnp.bfloat16)
    return Case(fn, (*by_row(dim, M), *by_row(out, M), *layout), True)
  weights = ((E, out, dim), f8), ((E, out // 128, dim // 128), f32)
  fn = lambda *a: grouped_matmul_fp8(*a[:5], used=a[5], impl='gpu')
  return Case(fn, (*by_row(M, dim), *weights, *layout), True)


def _router(name):
  shape = router_shapes.BENCH[name]
  args = (((shape.tokens, shape.experts), jnp.float32),)
  if shape.bias:
    args += (((shape.experts,), jnp.float32),)
  fn = functools.partial(router, top_k=shape.top_k, rule=shape.rule, impl='gpu')
  return Case(fn, args, False)


def _quantize(name):
  shape = quantize_shapes.BENCH[name]
  fn = functools.partial(
    quantize,
    block=shape.block,
    power_of_two=shape.power_of_two,
    impl='gpu',
  )
  return Case(fn, (((shape.rows, shape.columns), jnp.bfloat16),), False)


def _sinkhorn(tokens, backward):
  logits = ((tokens, 4, 4), jnp.float32)
  fn = functools.partial(sinkhorn, impl='gpu')
  if not backward:
    return Case(fn, (logits,), False)
  return Case(lambda x, g: jax.vjp(fn, x)[1](g), (logits, logits), False)


def _mla_prefill(tokens, backward):
  bf = jnp.bfloat16
  wide, narrow = ((1, tokens, 128, 192), bf), ((1, tokens, 128, 128), bf)
  segments = ((1, tokens), jnp.int32)
  fn = functools.partial(mla_prefill, scale=0.07, impl='gpu')
  if not backward:
    return Case(fn, (wide, wide, narrow, segments), True)

  def grads(q, k, v, segments, grad):
    return jax.vjp(lambda *a: fn(*a, segments), q, k, v)[1](grad)

  return Case(grads, (wide, wide, narrow, segments, narrow), True)


CASES = {
  'mla_decode_h128': _mla_decode(128, 1, 128, 1),
  'mla_decode_h128_s2_split4': _mla_decode(4, 2, 128, 4),
  'mla_decode_h16': _mla_decode(128, 1, 16, 1),
  **{
    f'grouped_matmul_{kind}_{name}': _grouped(*shape, kind)
    for kind in ('fwd', 'dlhs', 'drhs')
    for name, shape in {
      'b128': ((1024,) * 32, 7168, 4096, 128),
      'b64': ((64,) * 256, 7168, 4096, 64),
      'f1408': ((768,) * 64, 2048, 1408, 128),
    }.items()
  },
  'grouped_swiglu_b128': _grouped_swiglu((1024,) * 32, 7168, 2048, 128),
  'grouped_swiglu_b64': _grouped_swiglu((64,) * 256, 7168, 2048, 64),
  'grouped_matmul_fp8_b128': _grouped_fp8((1024,) * 32, 7168, 4096, 128, 'fwd'),
  'grouped_matmul_fp8_b64': _grouped_fp8((64,) * 256, 7168, 4096, 64, 'fwd'),
  'grouped_matmul_fp8_drhs': _grouped_fp8(
    (1024,) * 32, 7168, 4096, 128, 'drhs'
  ),
  **{f'quantize_{n}': _quantize(n) for n in quantize_shapes.BENCH},
  'mla_prefill': _mla_prefill(4096, False),
  'mla_prefill_bwd': _mla_prefill(4096, True),
  'sinkhorn': _sinkhorn(8192, False),
  'sinkhorn_bwd': _sinkhorn(8192, True),
  **{f'router_{n}': _router(n) for n in router_shapes.BENCH},
  'permute': _permute('permute', 4096, 8, 256, 7168),
  'permute_fp8': _permute('permute_fp8', 4096, 8, 256, 7168),
  'permute_bwd': _permute('permute_bwd', 4096, 8, 256, 7168),
  'combine': _permute('combine', 4096, 8, 256, 7168),
  'combine_bwd': _permute('combine_bwd', 4096, 8, 256, 7168),
  **aot_cases_sparse.CASES,
}
