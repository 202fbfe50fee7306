"""grouped_swiglu and grouped_matmul_fp8 against loops in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.grouped_matmul import (
  grouped_matmul_fp8,
  grouped_swiglu,
  shapes,
)


def layout(shape):
  """Expert of each block, two of filler at the end, and which rows are real."""
  blocks = [-(-c // shape.block) for c in shape.counts]
  last = len(blocks) - 1
  expert = np.append(np.repeat(np.arange(len(blocks)), blocks), [last, last])
  real = np.zeros(len(expert) * shape.block, bool)
  starts = (np.cumsum(blocks) - blocks) * shape.block
  for start, count in zip(starts, shape.counts):
    real[start : start + count] = True
  return expert.astype(np.int32), real, sum(blocks)


def swiglu_loop(rows, gate_up, per_row, limit):
  out = []
  for x, e in zip(rows, per_row):
    gate, up = np.split(x @ gate_up[e], 2)
    if limit is not None:
      gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    out.append(gate / (1 + np.exp(-gate)) * up)
  return np.stack(out)


def draw_fp8(shape, rng):
  """Numbers that a float8 holds, and scales."""
  expert, real, used = layout(shape)
  E, D, F = len(shape.counts), shape.dim, shape.out
  codes = lambda *size: rng.normal(size=size).astype(ml_dtypes.float8_e4m3fn)
  rows = np.where(real[:, None], codes(len(real), D), 0)
  scales = lambda *size: (rng.random(size) + 0.5).astype(np.float32)
  return (
    rows.astype(ml_dtypes.float8_e4m3fn),
    scales(len(real), D // 128),
    codes(E, F, D),
    scales(E, F // 128, D // 128),
    expert,
  ), used


class GroupedSwigluTest(parameterized.TestCase):
  @parameterized.product(name=('ragged', 'one_row'), limit=(None, 1.5))
  def test_value_and_gradient_equal_a_loop_in_float64(self, name, limit):
    shape = shapes.TEST[name]
    rng = np.random.default_rng(0)
    expert, real, _ = layout(shape)
    rows = rng.normal(size=(len(real), shape.dim)) * real[:, None]
    gate_up = rng.normal(size=(len(shape.counts), shape.dim, 2 * shape.out))
    per_row = np.repeat(expert, shape.block)
    loop = lambda r, w: swiglu_loop(r, w, per_row, limit)
    narrow = [a.astype(np.float32) for a in (rows, gate_up)]
    got, pull = jax.vjp(
      lambda r, w: grouped_swiglu(r, w, expert, limit=limit), *narrow
    )
    np.testing.assert_allclose(got, loop(rows, gate_up), rtol=2e-5, atol=2e-5)
    weight = np.cos(np.arange(got.size)).reshape(got.shape)
    grads = pull(jnp.asarray(weight, jnp.float32))
    # Filler sits on the clamps' edge nowhere, so differences are smooth.
    ways = [rng.normal(size=a.shape) for a in (rows, gate_up)]
    ways[0] *= real[:, None]
    ahead, behind = (
      loop(rows + step * ways[0], gate_up + step * ways[1])
      for step in (1e-6, -1e-6)
    )
    slope = ((ahead - behind) * weight).sum() / 2e-6
    along = sum((g * way).sum() for g, way in zip(grads, ways))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)

  def test_bad_input_names_the_field(self):
    rows, expert = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    with self.assertRaisesRegex(ValueError, r'ask for \[E 128 2F\]'):
      grouped_swiglu(rows, jnp.zeros((1, 64, 256), jnp.bfloat16), expert)
    with self.assertRaisesRegex(NotImplementedError, 'widths 128 and 96'):
      weights = jnp.zeros((1, 128, 192), jnp.bfloat16)
      grouped_swiglu(rows, weights, expert, impl='gpu')


class GroupedMatmulFp8Test(parameterized.TestCase):
  @parameterized.named_parameters(shapes.TEST_WIDE.items())
  def test_reference_equals_scaled_blocks_in_float64(self, shape):
    args, used = draw_fp8(shape, np.random.default_rng(0))
    rows, row_scales, weights, weight_scales, expert = args
    got = grouped_matmul_fp8(*args, used=used, dtype=jnp.float32)
    want = np.zeros((len(rows), shape.out))
    for e in range(len(weights)):
      mine = np.repeat(expert == e, shape.block)
      x, w = rows[mine].astype(np.float64), weights[e].astype(np.float64)
      for k in range(shape.dim // 128):
        for f in range(shape.out // 128):
          inner, outer = (slice(128 * i, 128 * (i + 1)) for i in (k, f))
          part = x[:, inner] @ w[outer, inner].T * weight_scales[e, f, k]
          want[mine, outer] += part * row_scales[mine, k][:, None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)

  def test_bad_input_names_the_field(self):
    args, _ = draw_fp8(shapes.TEST_WIDE['rows_64'], np.random.default_rng(0))
    with self.assertRaisesRegex(ValueError, r'row_scales is \[256, 4\]'):
      grouped_matmul_fp8(args[0], args[1][:, 1:], *args[2:])
    with self.assertRaisesRegex(NotImplementedError, 'result in float32'):
      grouped_matmul_fp8(*args, dtype=jnp.float32, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'has no gradient'):
      rest = args[1:]
      jax.grad(
        lambda x: grouped_matmul_fp8(x, *rest).astype(jnp.float32).sum()
      )(jnp.asarray(args[0]))


if __name__ == '__main__':
  absltest.main()
