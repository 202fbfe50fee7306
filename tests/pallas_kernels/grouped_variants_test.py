"""grouped_swiglu and the float8 products against loops in float64."""

import os
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import compat
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
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


def rounded(x, block, power_of_two=False, floor=0.0):
  """x after float8 with a scale per block, by the definition in float64."""
  (N, D), (R, C) = x.shape, block
  parts = x.astype(np.float64).reshape(N // R, R, D // C, C)
  amax = np.maximum(np.abs(parts).max(axis=(1, 3), keepdims=True), floor)
  scale = np.where(amax > 0, amax, 1) / 448
  if power_of_two:
    scale = np.exp2(np.ceil(np.log2(scale)))
  codes = np.clip(parts / scale, -448, 448).astype(np.float32)
  codes = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
  return (codes * scale).reshape(N, D)


class GroupedMatmulFloat8Test(parameterized.TestCase):
  def draw(self, shape):
    rng = np.random.default_rng(0)
    expert, real, used = layout(shape)
    E, D, F = len(shape.counts), shape.dim, shape.out
    # Rows of very different size: one scale for all would lose the small.
    size = np.exp(rng.normal(size=(len(real), 1)) * 2) * real[:, None]
    rows = (rng.normal(size=(len(real), D)) * size).astype(np.float32)
    rows[0] *= 1e-6  # below the floor of activations
    weights = rng.normal(size=(E, D, F)).astype(np.float32)
    grad = (rng.normal(size=(len(real), F)) * size).astype(np.float32)
    return rows, weights, grad, expert, used

  def loop(self, rows, weights, grad, expert, block):
    """Value and gradients of the products of rounded factors."""
    w = np.stack([rounded(m, (128, 128)) for m in weights])
    x, g = rounded(rows, (1, 128), True, 1e-4), rounded(grad, (1, 128), True)
    along = lambda a, floor: (
      rounded(a.T, (1, np.gcd(block, 128)), True, floor).T
    )
    x_down, g_down = along(x, 1e-4), along(grad, 0.0)
    per_row = np.repeat(expert, block)
    out = np.stack([row @ w[e] for row, e in zip(x, per_row)])
    drows = np.stack([row @ w[e].T for row, e in zip(g, per_row)])
    dweights = np.zeros(w.shape)
    for row, d, e in zip(x_down, g_down, per_row):
      dweights[e] += np.outer(row, d)
    return out, drows, dweights

  @parameterized.product(name=sorted(shapes.TEST_WIDE), transpose=(False, True))
  def test_value_and_gradients_are_those_of_rounded_factors(
    self, name, transpose
  ):
    shape = shapes.TEST_WIDE[name]._replace(dim=256)
    rows, weights, grad, expert, used = self.draw(shape)
    turn = (lambda w: w.swapaxes(1, 2)) if transpose else (lambda w: w)
    fn = lambda x, w: grouped_matmul(
      x, w, expert, used=used, transpose=transpose, float8=True
    )
    out, pull = jax.vjp(fn, rows, turn(weights))
    drows, dweights = pull(jnp.asarray(grad))
    want = self.loop(rows, weights, grad, expert, shape.block)
    for got, wanted in zip((out, drows, turn(dweights)), want):
      scale = np.abs(wanted).max()
      np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * scale)

  @parameterized.parameters(False, True)
  def test_gradients_follow_the_scale_of_the_loss_exactly(self, transpose):
    args = self.draw(shapes.TEST_WIDE['rows_128'])
    rows, weights, grad, expert, used = args
    weights = weights.swapaxes(1, 2) if transpose else weights
    fn = lambda x, w: grouped_matmul(
      x, w, expert, used=used, transpose=transpose, float8=True
    )
    pull = jax.jit(jax.vjp(fn, rows, weights)[1])
    want = pull(jnp.asarray(grad))
    for k in (10, 40, 80):
      s = np.float32(2.0**-k)
      for got, whole in zip(pull(jnp.asarray(grad * s)), want):
        self.assertGreater(float(jnp.abs(whole).max()), 0)
        np.testing.assert_array_equal(got, whole * s, err_msg=f'2^-{k}')

  def test_small_weights_have_no_floor(self):
    rows, weights, _, expert, used = self.draw(shapes.TEST_WIDE['rows_128'])
    fn = lambda w: grouped_matmul(rows, w, expert, used=used, float8=True)
    s = np.float32(2.0**-60)
    np.testing.assert_array_equal(fn(weights * s), fn(weights) * s)

  def test_it_is_near_the_product_itself(self):
    rows, weights, grad, expert, used = self.draw(shapes.TEST_WIDE['rows_128'])
    both = [
      jax.vjp(
        lambda x, w, f=f: grouped_matmul(x, w, expert, used=used, float8=f),
        rows,
        weights,
      )
      for f in (True, False)
    ]
    pairs = [(both[0][0], both[1][0])]
    pairs += zip(both[0][1](jnp.asarray(grad)), both[1][1](jnp.asarray(grad)))
    for got, want in pairs:
      error = np.linalg.norm(got - want) / np.linalg.norm(want)
      # Two factors with 3 bits after the leading one: about 2.6 % each.
      self.assertBetween(error, 0.01, 0.05)

  def test_bad_input_is_refused(self):
    rows, weights, expert = jnp.zeros((64, 128)), jnp.zeros((1, 128, 192)), [0]
    with self.assertRaisesRegex(ValueError, 'float8: width 192'):
      grouped_matmul(rows, weights, jnp.asarray(expert), float8=True)
    fn = lambda w: (
      grouped_matmul(
        rows.astype(jnp.bfloat16),
        w,
        jnp.asarray(expert),
        float8=True,
        impl='gpu',
      )
      .astype(jnp.float32)
      .sum()
    )
    wanted = self.assertRaisesRegex(NotImplementedError, '64 rows a scale')
    room = mock.patch.dict(os.environ, {'NPROC': '8'})  # nothing runs
    with wanted, compat.interpreted(), room:
      jax.eval_shape(jax.grad(fn), jnp.zeros((1, 128, 128), jnp.bfloat16))


if __name__ == '__main__':
  absltest.main()
