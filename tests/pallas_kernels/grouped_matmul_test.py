"""grouped_matmul against a loop over experts in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  reference,
  shapes,
)

CASES = [(name, shape) for name, shape in shapes.TEST.items()]


def draw(shape, dtype=np.float32, extra_blocks=2):
  """Rows, weights and the expert of each block; filler rows are zero."""
  rng = np.random.default_rng(0)
  blocks = [-(-c // shape.block) for c in shape.counts]
  expert = np.repeat(np.arange(len(shape.counts)), blocks)
  total = (len(expert) + extra_blocks) * shape.block
  rows = np.zeros((total, shape.dim))
  starts = np.concatenate([[0], np.cumsum(blocks)]) * shape.block
  for start, count in zip(starts, shape.counts):
    rows[start : start + count] = rng.normal(size=(count, shape.dim))
  weights = rng.normal(size=(len(shape.counts), shape.dim, shape.out))
  expert = np.concatenate([expert, [len(shape.counts) - 1] * extra_blocks])
  return rows.astype(dtype), weights.astype(dtype), expert.astype(np.int32)


def loop(rows, weights, expert):
  """The product row by row, in float64, and its gradients for ones."""
  rows, weights = rows.astype(np.float64), weights.astype(np.float64)
  per_row = np.repeat(expert, len(rows) // len(expert))
  out = np.stack([x @ weights[e] for x, e in zip(rows, per_row)])
  g = np.cos(np.arange(out.size).reshape(out.shape))
  drows = np.stack([d @ weights[e].T for d, e in zip(g, per_row)])
  dweights = np.zeros_like(weights)
  for x, d, e in zip(rows, g, per_row):
    dweights[e] += np.outer(x, d)
  return out, g, drows, dweights


class GroupedMatmulTest(parameterized.TestCase):
  @parameterized.named_parameters(CASES)
  def test_value_and_gradients_equal_a_loop_in_float64(self, shape):
    rows, weights, expert = draw(shape)
    want, g, drows, dweights = loop(rows, weights, expert)
    got, pull = jax.vjp(
      lambda r, w: grouped_matmul(r, w, jnp.asarray(expert)), rows, weights
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    dr, dw = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(dr, drows, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dw, dweights, rtol=1e-5, atol=2e-5)

  @parameterized.named_parameters(CASES)
  def test_transpose_equals_transposed_weights(self, shape):
    rows, weights, expert = draw(shape)
    turned = np.ascontiguousarray(weights.swapaxes(1, 2))
    want, g, drows, dweights = loop(rows, weights, expert)
    got, pull = jax.vjp(
      lambda r, w: grouped_matmul(r, w, jnp.asarray(expert), transpose=True),
      rows,
      turned,
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    dr, dw = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(dr, drows, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(
      dw, dweights.swapaxes(1, 2), rtol=1e-5, atol=2e-5
    )

  def test_bfloat16_weight_gradient_sums_in_float32(self):
    # 512 blocks of one row: a bfloat16 sum of ones would stop at 256.
    rows = jnp.ones((512, 1), jnp.bfloat16)
    weights = jnp.ones((1, 1, 1), jnp.bfloat16)
    expert = jnp.zeros(512, jnp.int32)
    dw = jax.grad(lambda w: grouped_matmul(rows, w, expert).sum())(weights)
    self.assertEqual(float(dw[0, 0, 0]), 512)

  def test_blocks_after_used_are_skipped(self):
    rows, weights, expert = draw(shapes.TEST['ragged'], extra_blocks=4)
    full = grouped_matmul(rows, weights, expert)
    some = grouped_matmul(rows, weights, expert, used=len(expert) - 4)
    np.testing.assert_array_equal(full, some)
    none = grouped_matmul(rows, weights, expert, used=1)
    np.testing.assert_array_equal(full[:8], none[:8])
    self.assertFalse(np.asarray(none)[8:].any())

  def test_experts_in_any_order_and_runs_longer_than_a_chunk(self):
    rng = np.random.default_rng(0)
    expert = np.repeat([2, 0, 2, 1], [41, 3, 70, 1]).astype(np.int32)
    rows = rng.normal(size=(len(expert) * 16, 4)).astype(np.float32)
    weights = rng.normal(size=(3, 4, 5)).astype(np.float32)
    want, g, drows, dweights = loop(rows, weights, expert)
    got, pull = jax.vjp(
      lambda r, w: grouped_matmul(r, w, jnp.asarray(expert)), rows, weights
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    dr, dw = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(dr, drows, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dw, dweights, rtol=1e-5, atol=1e-4)

  @parameterized.parameters(
    ((64, 128), (1, 128, 128), 1, jnp.float32, 'dtype float32'),
    ((32, 128), (1, 128, 128), 1, jnp.bfloat16, 'rows in steps of 32'),
    ((64, 96), (1, 96, 128), 1, jnp.bfloat16, 'width 96'),
    ((64, 128), (1, 128, 100), 1, jnp.bfloat16, 'width 100'),
  )
  def test_unsupported_kernel_shape_says_why(
    self, rows, weights, blocks, dtype, reason
  ):
    expert = jnp.zeros(blocks, jnp.int32)
    with self.assertRaisesRegex(NotImplementedError, reason):
      grouped_matmul(
        jnp.zeros(rows, dtype), jnp.zeros(weights, dtype), expert, impl='gpu'
      )

  def test_bad_shapes_name_the_field(self):
    rows, weights = jnp.zeros((8, 4)), jnp.zeros((2, 5, 3))
    with self.assertRaisesRegex(ValueError, 'disagree on the width: 4 and 5'):
      grouped_matmul(rows, weights, jnp.zeros(2, jnp.int32))
    with self.assertRaisesRegex(ValueError, '8 rows are no multiple of the 3'):
      grouped_matmul(rows, weights[:, :4], jnp.zeros(3, jnp.int32))


class RunsTest(parameterized.TestCase):
  @parameterized.parameters(32, 64, 128, 192, 512)
  def test_no_product_takes_all_rows(self, total):
    """It would not change from turn to turn, and XLA do it for each run."""
    rows, weights = jnp.ones((total, 8)), jnp.ones((4, 8, 8))
    expert = jnp.arange(total) * 4 // total
    run = functools.partial(reference.by_runs, transpose=False)
    lines = str(jax.make_jaxpr(run)(rows, weights, expert, total)).splitlines()
    products = [line for line in lines if ' = dot_general[' in line]
    self.assertNotEmpty(products)
    shapes_ = [re.search(r':f32\[(\d+),', line) for line in products]
    self.assertLess(max(int(found[1]) for found in shapes_), total)


if __name__ == '__main__':
  absltest.main()
