"""SwiGLU into float8, and its gradient, against loops in float64."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.quantize import ACTIVATION_FLOOR, dequantize
from pallas_kernels.swiglu_quantize import swiglu_gradient, swiglu_quantize
from pallas_kernels.swiglu_quantize.shapes import TEST

VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
VALUES = np.unique(VALUES.astype(np.float64)[np.isfinite(VALUES)])


def draw(shape, dtype=jnp.float32):
  """Rows of very different size, one of them zero, and a gradient."""
  rng = np.random.default_rng(0)
  size = 10.0 ** rng.integers(-4, 2, (shape.rows, 1))
  h = rng.normal(size=(shape.rows, 2 * shape.columns)) * size
  h[1:][-1:] = 0
  if shape.limit is not None:
    h[0, :3] = h[0, shape.columns :][:3] = shape.limit  # on the border
    h[1, shape.columns] = -shape.limit
  grad = rng.normal(size=(shape.rows, shape.columns)) * size
  return jnp.asarray(h, dtype), jnp.asarray(grad, dtype)


def by_hand(h, grad, limit):
  """The activation and the gradients of gate and up, number by number."""
  h, grad = np.asarray(h, np.float64), np.asarray(grad, np.float64)
  M, F = grad.shape
  out, found = np.zeros((M, F)), np.zeros((M, 2 * F))
  high = math.inf if limit is None else limit
  for m in range(M):
    for f in range(F):
      gate, up = h[m, f], h[m, F + f]
      # On a border the slope is half of either side's.
      inside = [(x < high) / 2 + (x <= high) / 2 for x in (gate, up)]
      inside[1] *= (up > -high) / 2 + (up >= -high) / 2
      gate, up = min(gate, high), max(min(up, high), -high)
      share = 1 / (1 + math.exp(-gate))
      out[m, f] = gate * share * up
      slope = share * (1 + gate * (1 - share))
      found[m, f] = grad[m, f] * up * slope * inside[0]
      found[m, F + f] = grad[m, f] * gate * share * inside[1]
  return out, found


class SwigluQuantizeTest(parameterized.TestCase):
  def holds(self, q, scales, exact, power, floor):
    """Asserts that q and scales are those of `exact` in float8."""
    self.assertEqual(q.dtype, jnp.float8_e4m3fn)
    amax = abs(exact).reshape(len(exact), -1, 128).max(-1)
    wanted = np.maximum(np.maximum(amax, floor) / 448, 2.0**-126)
    if power:
      wanted = 2.0 ** np.ceil(np.log2(wanted))
    np.testing.assert_allclose(scales, wanted, rtol=1e-5)
    x = exact / np.repeat(wanted, 128, axis=1)
    at = np.clip(np.searchsorted(VALUES, x), 1, len(VALUES) - 1)
    nearest = np.minimum(abs(VALUES[at] - x), abs(VALUES[at - 1] - x))
    error = abs(np.asarray(q, np.float64) - x)
    # float32 may take the other side of a tie.
    np.testing.assert_array_less(error, nearest + 1e-5 * abs(x) + 1e-9)

  @parameterized.product(name=sorted(TEST), floor=(0.0, ACTIVATION_FLOOR))
  def test_it_is_the_nearest_float8_of_the_activation(self, name, floor):
    shape = TEST[name]
    h, grad = draw(shape)
    how = {'limit': shape.limit, 'power_of_two': shape.power_of_two}
    q, scales = swiglu_quantize(h, floor=floor, impl='reference', **how)
    exact, _ = by_hand(h, grad, shape.limit)
    self.holds(q, scales, exact, shape.power_of_two, floor)

  @parameterized.product(name=sorted(TEST), dtype=(jnp.float32, jnp.bfloat16))
  def test_the_gradient_is_that_of_float64_and_its_float8(self, name, dtype):
    shape = TEST[name]
    h, grad = draw(shape, dtype)
    how = {'limit': shape.limit, 'power_of_two': shape.power_of_two}
    got, (q, scales) = swiglu_gradient(h, grad, impl='reference', **how)
    self.assertEqual(got.dtype, dtype)
    _, exact = by_hand(h, grad, shape.limit)
    step = 2.0**-8 if dtype == jnp.bfloat16 else 2e-6
    wide = np.asarray(got, np.float64)
    largest = abs(exact).max(-1, keepdims=True)
    np.testing.assert_array_less(
      abs(wide - exact), step * abs(exact) + 1e-6 * largest + 1e-30
    )
    # The gradient itself is what was quantised.
    self.holds(q, scales, wide, shape.power_of_two, 0.0)
    self.assertLessEqual(
      float(abs(dequantize(q, scales) - wide).max()), abs(wide).max() / 16
    )

  def test_bad_input_is_answered_in_a_line(self):
    h = jnp.zeros((2, 256))
    with self.assertRaisesRegex(ValueError, 'not a matrix of two halves'):
      swiglu_quantize(jnp.zeros((2, 384)))
    with self.assertRaisesRegex(ValueError, 'floor = -1'):
      swiglu_quantize(h, floor=-1)
    with self.assertRaisesRegex(ValueError, r'float32 \[2, 128\]'):
      swiglu_gradient(h, jnp.zeros((2, 128), jnp.bfloat16))
    with self.assertRaisesRegex(NotImplementedError, 'float16, not bfloat16'):
      swiglu_quantize(h.astype(jnp.float16), impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'swiglu_gradient'):
      jax.grad(lambda h: swiglu_quantize(h)[1].sum())(h)


if __name__ == '__main__':
  absltest.main()
