"""Empty batches: no kernel is launched for them, the answers are empty."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch, latent_kv, permute
from pallas_kernels.collapse_norm import collapse_norm
from pallas_kernels.compress import compress
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_fp8,
  grouped_swiglu,
)
from pallas_kernels.index_candidates import index_candidates
from pallas_kernels.indexer import indexer
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.quantize import dequantize, quantize, quantize_columns
from pallas_kernels.router import router
from pallas_kernels.router import shapes as router_shapes
from pallas_kernels.sinkhorn import sinkhorn
from pallas_kernels.sparse_mla import sparse_mla
from pallas_kernels.swiglu_quantize import swiglu_gradient, swiglu_quantize
from pallas_kernels.write_streams import write_streams

BF, F8, I32 = jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32
RULE = router_shapes.Rule('sigmoid', 8, 4, 'top2')


def zeros(*shape, dtype=BF):
  return jnp.zeros(shape, dtype)


def plan_of(tokens):
  return permute.plan(zeros(tokens, 2, dtype=I32), 4, block=64)


def store(x, impl):
  angles = zeros(0, 32, dtype=jnp.float32)
  pages = latent_kv.Pages(zeros(2, 64, 512), zeros(2, 64, 64))
  slots = zeros(0, dtype=I32)
  return latent_kv.latent_kv(
    x, zeros(256, 576), zeros(512), angles, angles, slots, pages, impl=impl
  )


def decode(q, impl, scales=None):
  c = zeros(2, 64, 512, dtype=BF if scales is None else F8)
  layout = zeros(0, 2, dtype=I32), zeros(0, dtype=I32)
  return mla_decode(
    q,
    zeros(0, 1, 64, 64),
    c,
    zeros(2, 64, 64),
    *layout,
    scale=1.0,
    scales=scales,
    impl=impl,
  )


def product(rows, impl, **how):
  weights = zeros(4, 256, 256)
  return grouped_matmul(rows, weights, zeros(0, dtype=I32), impl=impl, **how)


def product_fp8(rows, impl):
  scales = zeros(0, 2, dtype=jnp.float32), zeros(4, 2, 2, dtype=jnp.float32)
  weights = zeros(4, 256, 256, dtype=F8)
  blocks = zeros(0, dtype=I32)
  return grouped_matmul_fp8(
    rows.astype(F8), scales[0], weights, scales[1], blocks, impl=impl
  )


# Function of (array, impl), shape of the empty array, shapes of the results.
CASES = {
  'mla_decode': (decode, (0, 1, 64, 512), [(0, 1, 64, 512)]),
  'mla_decode_fp8': (
    functools.partial(decode, scales=zeros(2, 64, 4, dtype=jnp.float32)),
    (0, 1, 64, 512),
    [(0, 1, 64, 512)],
  ),
  'mla_prefill': (
    lambda q, impl: mla_prefill(q, q, q[..., :128], scale=1.0, impl=impl),
    (0, 128, 2, 192),
    [(0, 128, 2, 128)],
  ),
  'mla_prefill_no_tokens': (
    lambda q, impl: mla_prefill(q, q, q[..., :128], scale=1.0, impl=impl),
    (2, 0, 2, 192),
    [(2, 0, 2, 128)],
  ),
  'latent_kv': (store, (0, 256), [(2, 64, 512), (2, 64, 64)]),
  'router': (
    lambda x, impl: router(x, top_k=8, rule=RULE, impl=impl),
    (0, 64),
    [(0, 8), (0, 8), (64,)],
  ),
  'permute': (
    lambda x, impl: permute.permute(x, plan_of(0), impl=impl),
    (0, 256),
    [(64, 256)],
  ),
  'permute_fp8': (
    lambda x, impl: permute.permute_fp8(x, plan_of(0), impl=impl),
    (0, 1024),
    [(64, 1024), (64, 8)],
  ),
  'combine': (
    lambda w, impl: permute.combine(zeros(64, 256), w, plan_of(0), impl=impl),
    (0, 2),
    [(0, 256)],
  ),
  'grouped_matmul': (product, (0, 256), [(0, 256)]),
  'grouped_matmul_fp8': (product_fp8, (0, 256), [(0, 256)]),
  'grouped_swiglu': (
    lambda x, impl: grouped_swiglu(
      x, zeros(4, 256, 256), zeros(0, dtype=I32), impl=impl
    ),
    (0, 256),
    [(0, 128)],
  ),
  'indexer': (
    lambda q, impl: indexer(
      q, zeros(0, 64, 128), zeros(0, 5, 64), top_k=4, impl=impl
    ),
    (0, 5, 64, 128),
    [(0, 5, 4)],
  ),
  'indexer_fp8': (
    lambda q, impl: indexer(
      q.astype(jnp.float8_e4m3fn),
      zeros(0, 64, 128, dtype=jnp.float8_e4m3fn),
      zeros(0, 5, 64),
      top_k=4,
      q_scale=zeros(0, 5, 64),
      k_scale=zeros(0, 64),
      impl=impl,
    ),
    (0, 5, 64, 128),
    [(0, 5, 4)],
  ),
  'index_candidates': (
    lambda q, impl: index_candidates(
      q,
      zeros(0, 64, 128),
      zeros(0, 5, 64),
      zeros(0, 5, 3, dtype=I32),
      zeros(0, 5, dtype=I32),
      size=64,
      top_k=4,
      impl=impl,
    ),
    (0, 5, 64, 128),
    [(0, 5, 4)],
  ),
  'sparse_mla': (
    lambda q, impl: sparse_mla(
      q,
      zeros(0, 5, 64, 64),
      zeros(0, 9, 512),
      zeros(0, 9, 64),
      zeros(0, 5, 64, dtype=I32),
      scale=1.0,
      impl=impl,
    ),
    (0, 5, 64, 512),
    [(0, 5, 64, 512)],
  ),
  'quantize': (quantize, (0, 256), [(0, 256), (0, 2)]),
  'quantize_columns': (quantize_columns, (0, 256), [(256, 0), (256, 0)]),
  'quantize_squares': (
    functools.partial(quantize, block=(128, 128)),
    (0, 256),
    [(0, 256), (0, 2)],
  ),
  'sinkhorn': (sinkhorn, (0, 4, 4), [(0, 4, 4)]),
  'write_streams': (
    lambda x, impl: write_streams(
      x,
      zeros(0, 512),
      zeros(0, 4, dtype=jnp.float32),
      zeros(0, 4, 4, dtype=jnp.float32),
      impl=impl,
    ),
    (0, 4, 512),
    [(0, 4, 512)],
  ),
  'collapse_norm': (
    lambda x, impl: collapse_norm(
      x, zeros(0, 4, dtype=jnp.float32), jnp.ones(1024), impl=impl
    ),
    (0, 4, 1024),
    [(0, 1024)],
  ),
  'compress': (
    lambda kv, impl: compress(
      kv, kv, zeros(8, 1, 128), zeros(2, 0, dtype=I32), impl=impl
    ),
    (2, 8, 1, 128),
    [(2, 0, 128)],
  ),
  'swiglu_quantize': (swiglu_quantize, (0, 256), [(0, 128), (0, 1)]),
  'swiglu_gradient': (
    lambda h, impl: swiglu_gradient(h, zeros(0, 128), impl=impl),
    (0, 256),
    [(0, 256), (0, 256), (0, 2)],
  ),
}
NO_GRADIENT = (
  'grouped_matmul_fp8',
  'index_candidates',
  'indexer',
  'indexer_fp8',
  'latent_kv',
  'mla_decode',
  'mla_decode_fp8',
  'permute_fp8',
  'quantize',
  'quantize_columns',
  'quantize_squares',
  'swiglu_gradient',
  'swiglu_quantize',
)


class EmptyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    on_hopper = mock.patch.object(dispatch, 'on_hopper', lambda: True)
    self.enter_context(on_hopper)

  @parameterized.product(name=sorted(CASES))
  def test_nothing_in_gives_the_references_nothing(self, name):
    op, shape, want = CASES[name]
    got = jax.jit(functools.partial(op, impl=None))(zeros(*shape))
    self.assertEqual([a.shape for a in jax.tree.leaves(got)], want)
    self.assertFalse(
      any(a.astype('float32').any() for a in jax.tree.leaves(got))
    )
    # Not so on a Hopper GPU where the kernel is asked for.
    with self.assertRaisesRegex(NotImplementedError, 'an argument is empty'):
      op(zeros(*shape), impl='gpu')

  @parameterized.product(name=sorted(set(CASES) - set(NO_GRADIENT)))
  def test_its_gradient_is_empty_too(self, name):
    op, shape, _ = CASES[name]

    def total(x):
      leaves = jax.tree.leaves(op(x, impl=None))
      floats = [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]
      return sum(a.astype(jnp.float32).sum() for a in floats)

    self.assertEqual(jax.jit(jax.grad(total))(zeros(*shape)).shape, shape)

  def test_a_row_without_keys_has_neither_choice_nor_value(self):
    q, w = zeros(1, 2, 64, 128), zeros(1, 2, 64)
    chosen = indexer(q, zeros(1, 0, 128), w, top_k=3)
    self.assertEqual(chosen.tolist(), [[[-1] * 3] * 2])
    where = zeros(1, 2, 4, dtype=I32), zeros(1, 2, dtype=I32)
    for keys, starts in ((0, where[0]), (9, where[0][..., :0])):
      given = q, zeros(1, keys, 128), w, starts, where[1]
      chosen = index_candidates(*given, size=8, top_k=3)
      self.assertEqual(chosen.tolist(), [[[-1] * 3] * 2])
    args = zeros(1, 2, 64, 512), zeros(1, 2, 64, 64)
    none = zeros(1, 2, 0, dtype=I32)
    out = sparse_mla(*args, zeros(1, 9, 512), zeros(1, 9, 64), none, scale=1.0)
    self.assertFalse(out.any())
    pages = zeros(1, 64, 512), zeros(1, 64, 64)
    out = mla_decode(*args, *pages, none[:, 0], zeros(1, dtype=I32), scale=1.0)
    self.assertFalse(out.any())

  def test_float8_training_without_rows_quantises_the_weights_alone(self):
    def total(rows, impl):
      return product(rows, impl, float8=True).astype(jnp.float32).sum()

    rows, grad = zeros(0, 256), jax.grad(total)
    program = str(jax.make_jaxpr(functools.partial(grad, impl=None))(rows))
    self.assertLen(re.findall('mpmd_map|core_map', program), 1)
    self.assertEqual(grad(rows, 'reference').shape, (0, 256))

  def test_rows_without_blocks_are_refused(self):
    with self.assertRaisesRegex(ValueError, '5 rows are no multiple'):
      product(zeros(5, 256), None)

  def test_no_float8_numbers_are_no_numbers(self):
    q, scales = zeros(0, 256, dtype=F8), zeros(0, 2, dtype=jnp.float32)
    self.assertEqual(dequantize(q, scales).shape, (0, 256))


if __name__ == '__main__':
  absltest.main()
