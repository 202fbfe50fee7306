"""quantize against a search over all float8 values in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.quantize.shapes import TEST

# Every finite e4m3 value, from its bits.
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
VALUES = np.unique(VALUES.astype(np.float64)[np.isfinite(VALUES)])


def draw(shape):
  """Rows of very different size, one of them zero."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(shape.rows, shape.columns))
  x *= 10.0 ** rng.integers(-8, 5, (shape.rows, 1))
  x[-1] = 0
  return x.astype(np.float32)


def spread(scales, shape):
  return np.repeat(np.repeat(scales, shape.block[0], 0), shape.block[1], 1)


class QuantizeTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_values_are_the_nearest_float8_and_scales_follow_the_maximum(
    self, shape
  ):
    x = draw(shape)
    q, scales = quantize(
      x, block=shape.block, power_of_two=shape.power_of_two, impl='reference'
    )
    self.assertEqual(q.dtype, jnp.float8_e4m3fn)
    R, C = shape.block
    amax = np.abs(x).reshape(x.shape[0] // R, R, -1, C).max((1, 3))
    exact = np.maximum(amax.astype(np.float64), 1e-4) / 448
    if shape.power_of_two:
      exact = 2.0 ** np.ceil(np.log2(exact))
    np.testing.assert_allclose(scales, exact, rtol=2e-7)
    wanted = x.astype(np.float64) / spread(exact, shape)
    at = np.clip(np.searchsorted(VALUES, wanted), 1, len(VALUES) - 1)
    nearest = np.minimum(
      np.abs(VALUES[at] - wanted), np.abs(VALUES[at - 1] - wanted)
    )
    error = np.abs(np.asarray(q, np.float64) - wanted)
    # float32 may take the other side of a tie.
    np.testing.assert_array_less(error, nearest + 1e-6 * np.abs(wanted) + 1e-9)

  @parameterized.named_parameters(TEST.items())
  def test_round_trip_error_is_a_sixteenth_of_the_value_at_most(self, shape):
    x = draw(shape)
    q, scales = quantize(x, block=shape.block, power_of_two=shape.power_of_two)
    back = np.asarray(dequantize(q, scales), np.float64)
    # 3 bits of mantissa; below 2**-6 of the scale the steps are 2**-9 of it.
    bound = np.maximum(np.abs(x) / 16, spread(np.asarray(scales), shape) / 1024)
    np.testing.assert_array_less(np.abs(back - x), bound * 1.001 + 1e-30)

  @parameterized.parameters(448.0, 448.0 * 2, 1.0, 449.0, 3.5 * 448)
  def test_power_of_two_scale_is_the_least_that_fits(self, top):
    x = jnp.full((1, 128), top)
    _, scales = quantize(x, power_of_two=True)
    self.assertGreaterEqual(float(scales[0, 0]) * 448, top)
    self.assertLess(float(scales[0, 0]) * 448 / 2, top)
    packed = scales.astype(jnp.float8_e8m0fnu).astype(jnp.float32)
    np.testing.assert_array_equal(packed, scales)

  def test_a_gradient_is_refused(self):
    with self.assertRaisesRegex(NotImplementedError, 'no gradient'):
      jax.grad(lambda x: quantize(x)[1].sum())(jnp.ones((1, 128)))

  def test_bad_input_names_the_field(self):
    with self.assertRaisesRegex(ValueError, r'x is \[2, 100\]'):
      quantize(jnp.ones((2, 100)))
    with self.assertRaisesRegex(ValueError, r'scales \[3, 1\]'):
      dequantize(jnp.ones((4, 128)), jnp.ones((3, 1)))
    with self.assertRaisesRegex(NotImplementedError, r'blocks of \(1, 64\)'):
      quantize(jnp.ones((2, 128)), block=(1, 64), impl='gpu')


if __name__ == '__main__':
  absltest.main()
