"""Lists the kernels and shapes that are compiled ahead of time and exported."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot_cases_sparse, latent_kv, permute
from pallas_kernels.aot_cases_sparse import KernelCase, gradients
from pallas_kernels.collapse_norm import collapse_norm
from pallas_kernels.collapse_norm import shapes as collapse_shapes
from pallas_kernels.compress import compress
from pallas_kernels.compress import shapes as compress_shapes
from pallas_kernels.grouped_matmul import fp8 as grouped_fp8
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_fp8,
  grouped_swiglu,
)
from pallas_kernels.latent_kv import shapes as latent_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.permute.reference import num_blocks
from pallas_kernels.quantize import quantize, quantize_columns
from pallas_kernels.quantize import shapes as quantize_shapes
from pallas_kernels.router import router
from pallas_kernels.router import shapes as router_shapes
from pallas_kernels.sinkhorn import sinkhorn
from pallas_kernels.swiglu_quantize import shapes as swiglu_shapes
from pallas_kernels.swiglu_quantize import swiglu_gradient, swiglu_quantize
from pallas_kernels.write_streams import shapes as write_shapes
from pallas_kernels.write_streams import write_streams

BF, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
FP8 = jnp.float8_e4m3fn


def _mla_decode(batch: int, new: int, heads: int, splits: int) -> KernelCase:
  """Builds a decode step over 4096 cached bfloat16 tokens a request."""
  args = (
    ((batch, new, heads, 512), BF),
    ((batch, new, heads, 64), BF),
    ((batch * 64, 64, 512), BF),
    ((batch * 64, 64, 64), BF),
    ((batch, 64), I32),
    ((batch,), I32),
  )
  fn = functools.partial(mla_decode, scale=0.07, splits=splits, impl='gpu')
  return KernelCase(fn, args, True)


def _permute(
  name: str, tokens: int, choices: int, experts: int, dim: int
) -> KernelCase:
  """Builds one direction of the layout of V3's experts."""
  M = num_blocks(tokens * choices, experts, 128) * 128
  plan = (
    ((tokens, choices), I32),
    ((M,), I32),
    ((M // 128,), I32),
    ((experts,), I32),
  )
  x, rows = ((tokens, dim), BF), ((M, dim), BF)
  weights = ((tokens, choices), F32)
  arrays = {
    'permute': (x,),
    'permute_fp8': (x,),
    'permute_bwd': (rows,),
    'combine': (rows, weights),
    'combine_bwd': (rows, weights, x),
  }[name]

  def fn(*args: jax.Array) -> Any:
    given, layout = args[: len(arrays)], permute.Plan(*args[len(arrays) :])
    if name == 'permute':
      return permute.permute(*given, layout, impl='gpu')
    if name == 'permute_fp8':
      return permute.permute_fp8(*given, layout, impl='gpu')
    if name == 'combine':
      return permute.combine(*given, layout, impl='gpu')
    if name == 'permute_bwd':
      x = jnp.zeros((tokens, dim), BF)
      return jax.vjp(lambda x: permute.permute(x, layout, impl='gpu'), x)[1](
        *given
      )
    return jax.vjp(
      lambda r, w: permute.combine(r, w, layout, impl='gpu'), *given[:2]
    )[1](given[2])

  return KernelCase(fn, (*arrays, *plan), False)


def _grouped(
  counts: tuple[int, ...], dim: int, out: int, block: int, kind: str
) -> KernelCase:
  """Builds one product: 'fwd', 'dlhs' (transposed) or 'drhs'."""
  E, M = len(counts), sum(counts)
  layout = (((M // block,), I32), ((), I32))
  rows, grads, weights = ((M, dim), BF), ((M, out), BF), ((E, dim, out), BF)
  if kind == 'drhs':
    fn = lambda x, g, be, used: grouped_gpu.outer(x, g, be, used, E)
    return KernelCase(fn, (rows, grads, *layout), True)
  given = rows if kind == 'fwd' else grads
  fn = lambda x, w, be, used: grouped_matmul(
    x, w, be, used=used, transpose=kind == 'dlhs', impl='gpu'
  )
  return KernelCase(fn, (given, weights, *layout), True)


def _grouped_swiglu(
  counts: tuple[int, ...], dim: int, out: int, block: int
) -> KernelCase:
  """Builds the forward product of gate and up with its SwiGLU."""
  E, M = len(counts), sum(counts)
  layout = (((M // block,), I32), ((), I32))
  fn = lambda x, w, be, used: grouped_swiglu(x, w, be, used=used, impl='gpu')
  return KernelCase(
    fn, (((M, dim), BF), ((E, dim, 2 * out), BF), *layout), True
  )


def _grouped_fp8(
  counts: tuple[int, ...], dim: int, out: int, block: int, kind: str
) -> KernelCase:
  """Builds 'fwd', or 'drhs' of transposed rows and gradients."""
  E, M = len(counts), sum(counts)
  layout = (((M // block,), I32), ((), I32))
  by_row = lambda n, m: (((n, m), FP8), ((n, m // 128), F32))
  if kind == 'drhs':
    fn = lambda *a: grouped_fp8.outer(*a, E, BF)
    return KernelCase(fn, (*by_row(dim, M), *by_row(out, M), *layout), True)
  weights = ((E, out, dim), FP8), ((E, out // 128, dim // 128), F32)
  fn = lambda *a: grouped_matmul_fp8(*a[:5], used=a[5], impl='gpu')
  return KernelCase(fn, (*by_row(M, dim), *weights, *layout), True)


def _router(name: str) -> KernelCase:
  """Builds the routing of one of the benchmark shapes."""
  shape = (router_shapes.BENCH | router_shapes.LIMITS)[name]
  args = (((shape.tokens, shape.experts), F32),)
  if shape.bias:
    args += (((shape.experts,), F32),)
  fn = functools.partial(router, top_k=shape.top_k, rule=shape.rule, impl='gpu')
  return KernelCase(fn, args, False)


def _quantize(name: str) -> KernelCase:
  """Builds the quantisation of one of the benchmark shapes."""
  shape = quantize_shapes.BENCH[name]
  fn = functools.partial(
    quantize,
    block=shape.block,
    power_of_two=shape.power_of_two,
    impl='gpu',
  )
  return KernelCase(fn, (((shape.rows, shape.columns), BF),), False)


def _quantize_columns(float8: bool) -> KernelCase:
  """Builds the transposed quantisation, of bfloat16 or of float8."""
  fn = functools.partial(quantize_columns, power_of_two=True, impl='gpu')
  size = 8192, 7168
  if not float8:
    return KernelCase(fn, ((size, BF),), False)
  # Another size: what was compiled once is not compiled again.
  size = 4096, 7168
  args = (size, FP8), ((size[0], size[1] // 128), F32)
  return KernelCase(fn, args, False)


def _swiglu_quantize(name: str, backward: bool) -> KernelCase:
  """Builds the activation of one of the benchmark shapes, or its gradient."""
  shape = swiglu_shapes.BENCH[name]
  wide = ((shape.rows, 2 * shape.columns), BF)
  how = {'limit': shape.limit, 'power_of_two': shape.power_of_two}
  if not backward:
    fn = functools.partial(swiglu_quantize, floor=1e-4, impl='gpu', **how)
    return KernelCase(fn, (wide,), False)
  fn = functools.partial(swiglu_gradient, impl='gpu', **how)
  return KernelCase(fn, (wide, ((shape.rows, shape.columns), BF)), False)


def _collapse_norm(name: str, backward: bool) -> KernelCase:
  """Builds the normed sum of one of the benchmark shapes, or its gradients."""
  N, n, D = collapse_shapes.BENCH[name]
  args = ((N, n, D), BF), ((N, n), F32), ((D,), F32)
  fn = functools.partial(collapse_norm, impl='gpu')
  if not backward:
    return KernelCase(fn, args, False)
  return KernelCase(gradients(fn, 3), (((N, D), BF), *args), False)


def _write_streams(name: str, backward: bool) -> KernelCase:
  """Builds the new streams of one of the benchmark shapes, or gradients."""
  N, n, D = write_shapes.BENCH[name]
  streams = ((N, n, D), BF)
  args = streams, ((N, D), BF), ((N, n), F32), ((N, n, n), F32)
  fn = functools.partial(write_streams, impl='gpu')
  if not backward:
    return KernelCase(fn, args, False)
  return KernelCase(gradients(fn, 4), (streams, *args), False)


def _compress(name: str, backward: bool) -> KernelCase:
  """Builds the entries of one of the benchmark shapes, or their gradients."""
  (row,), m, J, C = compress_shapes.BENCH[name]
  L, S = sum(row), sum(row) // m
  tokens, entries = ((1, L, J, C), F32), ((1, S, C), F32)
  args = tokens, tokens, ((m, J, C), F32), *(((1, S), I32),) * J
  fn = functools.partial(compress, impl='gpu')
  if not backward:
    return KernelCase(fn, args, False)
  return KernelCase(gradients(fn, 3), (entries, *args), False)


def _sinkhorn(tokens: int, backward: bool) -> KernelCase:
  """Builds the normalisation of 4 x 4 matrices, or its gradient."""
  logits = ((tokens, 4, 4), F32)
  fn = functools.partial(sinkhorn, impl='gpu')
  if not backward:
    return KernelCase(fn, (logits,), False)
  return KernelCase(lambda x, g: jax.vjp(fn, x)[1](g), (logits, logits), False)


def _mla_prefill(tokens: int, backward: bool) -> KernelCase:
  """Builds one packed row with 128 heads, or its gradients."""
  wide, narrow = ((1, tokens, 128, 192), BF), ((1, tokens, 128, 128), BF)
  segments = ((1, tokens), I32)
  fn = functools.partial(mla_prefill, scale=0.07, impl='gpu')
  if not backward:
    return KernelCase(fn, (wide, wide, narrow, segments), True)
  args = narrow, wide, wide, narrow, segments
  return KernelCase(gradients(fn, 3), args, True)


def _latent_kv(name: str) -> KernelCase:
  """Builds the cache update of one of the benchmark shapes."""
  shape = latent_shapes.BENCH[name]
  N, D, size = shape.tokens, shape.dim, (shape.pages, shape.page)
  angles = ((N, 32), F32)
  given = (((N, D), BF), ((D, 576), BF), ((512,), F32), angles, angles)
  latent, key = ((*size, 512), FP8 if shape.fp8 else BF), ((*size, 64), BF)
  cache = (latent, ((*size, 4), F32), key) if shape.fp8 else (latent, key)
  kind = latent_kv.FP8Pages if shape.fp8 else latent_kv.Pages
  fn = lambda *a: latent_kv.latent_kv(*a[:6], kind(*a[6:]), impl='gpu')
  # Of two in a process the second finds the first one's product compiled.
  return KernelCase(
    fn, (*given, ((N,), I32), *cache), name != 'decode_b128_fp8'
  )


def _decode_fp8(batch: int, new: int, heads: int, splits: int) -> KernelCase:
  """Builds a decode step over 4096 cached float8 tokens a request."""
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
  return KernelCase(fn, args, True)


CASES = {
  'mla_decode_h128': _mla_decode(128, 1, 128, 1),
  'mla_decode_h128_s2_split4': _mla_decode(4, 2, 128, 4),
  'mla_decode_h16': _mla_decode(128, 1, 16, 1),
  # As the engine calls it: pages of 64 tokens, a token and its drafts.
  'mla_decode_paged_s2': _mla_decode(32, 2, 16, 4),
  'mla_decode_paged_s3': _mla_decode(32, 3, 16, 4),
  'mla_decode_paged_s4': _mla_decode(32, 4, 16, 4),
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
  'quantize_columns': _quantize_columns(False),
  'quantize_columns_float8': _quantize_columns(True),
  **{
    f'swiglu_{what}_{name}': _swiglu_quantize(name, what == 'gradient')
    for what in ('quantize', 'gradient')
    for name in swiglu_shapes.BENCH
  },
  'mla_prefill': _mla_prefill(4096, False),
  'mla_prefill_bwd': _mla_prefill(4096, True),
  'collapse_norm': _collapse_norm('v4_t8192', False),
  'collapse_norm_bwd': _collapse_norm('v4_t8192', True),
  'write_streams': _write_streams('v4_t8192', False),
  'write_streams_bwd': _write_streams('v4_t8192', True),
  **{
    f'compress{"_bwd" * backward}_{n}': _compress(n, backward)
    for backward in (False, True)
    for n in compress_shapes.BENCH
  },
  'sinkhorn': _sinkhorn(8192, False),
  'sinkhorn_bwd': _sinkhorn(8192, True),
  **{
    f'router_{n}': _router(n)
    for n in (*router_shapes.BENCH, *router_shapes.LIMITS)
  },
  'permute': _permute('permute', 4096, 8, 256, 7168),
  'permute_fp8': _permute('permute_fp8', 4096, 8, 256, 7168),
  'permute_bwd': _permute('permute_bwd', 4096, 8, 256, 7168),
  'combine': _permute('combine', 4096, 8, 256, 7168),
  'combine_bwd': _permute('combine_bwd', 4096, 8, 256, 7168),
  **{f'latent_kv_{n}': _latent_kv(n) for n in latent_shapes.BENCH},
  'mla_decode_fp8_h128': _decode_fp8(128, 1, 128, 1),
  'mla_decode_fp8_h16_split4': _decode_fp8(4, 2, 16, 4),
  **aot_cases_sparse.CASES,
}
