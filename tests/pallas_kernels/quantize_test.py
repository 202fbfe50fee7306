"""quantize against a search over all float8 values in float64."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.quantize import (
  ACTIVATION_FLOOR,
  dequantize,
  quantize,
  quantize_columns,
)
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
  def test_rounding_is_no_matter_of_xlas_precision(self):
    """XLA for GPUs drops a conversion there and back, were it not barred.

    On an H200 products in float8 were then those of unrounded numbers.
    `python -m pallas_kernels.aot --only=xla_rounds` asks the compiler itself.
    """

    def there_and_back(x):
      return dequantize(*quantize(x, impl='reference'))

    x = jax.ShapeDtypeStruct((4, 128), jnp.float32)
    text = (
      jax.jit(there_and_back)
      .trace(x)
      .lower(lowering_platforms=('cuda',))
      .as_text()
    )
    narrow = re.search(r'(%\w+) = stablehlo.convert .*-> tensor<.*f8E4M3', text)
    barred = re.findall(r'optimization_barrier (%\w+)', text)
    self.assertIn(narrow.group(1), barred)

  @parameterized.product(
    rows=(128, 32), power_of_two=(False, True), floor=(0.0, ACTIVATION_FLOOR)
  )
  def test_columns_are_rows_of_the_transposed(self, rows, power_of_two, floor):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 256)) * 10.0 ** rng.integers(-8, 5, (1, 256))
    how = {'power_of_two': power_of_two, 'floor': floor}
    got = quantize_columns(jnp.asarray(x, jnp.float32), rows=rows, **how)
    for d in (0, 77, 255):
      column = jnp.asarray(x[None, :, d], jnp.float32)
      q, scales = quantize(column, block=(1, rows), **how)
      np.testing.assert_array_equal(got[0][d], q[0])
      np.testing.assert_allclose(got[1][d], scales[0], rtol=2e-7)
    # Of float8, what it stands for in the dtype that the product has.
    small = quantize(jnp.asarray(x, jnp.float32), power_of_two=True)
    got = quantize_columns(*small, rows=rows, **how)
    wide = dequantize(*small, jnp.bfloat16)
    want = quantize_columns(wide, rows=rows, **how)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_columns_say_what_does_not_fit(self):
    x = jnp.zeros((128, 256))
    for args, how, reason in (
      ((x[:100],), {}, r'x is \[100, 256\]: not a matrix of 128'),
      ((x, jnp.zeros((128, 2))), {}, 'float8 has scales'),
      ((x.astype(jnp.float8_e4m3fn),), {}, 'float8 has scales'),
      (
        (x.astype(jnp.float8_e4m3fn), jnp.zeros((128, 1))),
        {},
        r'scales are \[128, 1\], but x \[128, 256\] asks for \[128, 2\]',
      ),
      (
        (x[:, :200].astype(jnp.float8_e4m3fn), jnp.zeros((128, 1))),
        {},
        r'x is \[128, 200\]: float8 has columns of 128',
      ),
      ((x,), {'floor': -1.0}, 'floor = -1.0'),
    ):
      with self.assertRaisesRegex(ValueError, reason):
        quantize_columns(*args, **how)
    with self.assertRaisesRegex(NotImplementedError, '32 rows a scale'):
      quantize_columns(x, rows=32, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'no gradient'):
      jax.grad(lambda x: quantize_columns(x)[1].sum())(x)

  @parameterized.product(name=sorted(TEST), floor=(0.0, ACTIVATION_FLOOR))
  def test_values_are_the_nearest_float8_and_scales_follow_the_maximum(
    self, name, floor
  ):
    x, shape = draw(TEST[name]), TEST[name]
    q, scales = quantize(
      x,
      block=shape.block,
      power_of_two=shape.power_of_two,
      floor=floor,
      impl='reference',
    )
    self.assertEqual(q.dtype, jnp.float8_e4m3fn)
    R, C = shape.block
    amax = np.abs(x).reshape(x.shape[0] // R, R, -1, C).max((1, 3))
    exact = np.maximum(amax.astype(np.float64), floor) / 448
    exact = np.maximum(exact, 2.0**-126)  # of zeros
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

  @parameterized.named_parameters(TEST.items())
  def test_without_a_floor_a_smaller_block_has_the_same_bits(self, shape):
    # A mean over more tokens makes all gradients smaller by one factor.
    x = draw(shape)
    x[:-1] /= np.abs(x[:-1]).max(axis=1, keepdims=True)
    op = jax.jit(
      lambda x: quantize(
        x, block=shape.block, power_of_two=shape.power_of_two, impl='reference'
      )
    )
    q, scales = op(x)
    for k in (1, 10, 40, 100):
      smaller, own = op(x * np.float32(2.0**-k))
      with self.subTest(k=k):
        np.testing.assert_array_equal(
          jax.lax.bitcast_convert_type(smaller, jnp.uint8),
          jax.lax.bitcast_convert_type(q, jnp.uint8),
        )
        some = np.asarray(scales) > 2.0**-126  # not those of zeros
        np.testing.assert_array_equal(
          np.asarray(own)[some], np.asarray(scales)[some] * 2.0**-k
        )

  @parameterized.product(
    top=(0.0, 1e-45, 1e-38, 2.0**-126, 2.0**-118, 3e38, np.inf, np.nan),
    power=(False, True),
    dtype=('float32', 'bfloat16'),
  )
  def test_the_ends_of_float32_have_sane_scales(self, top, power, dtype):
    x = np.full((2, 128), 2.0**-126)
    x[0, 0], x[1] = top, -1.5
    x = jnp.asarray(x, dtype)
    q, scales = quantize(x, power_of_two=power)
    self.assertTrue(jnp.isfinite(scales).all())
    self.assertTrue((scales >= 2.0**-126).all())
    self.assertTrue(jnp.isfinite(1 / scales).all())
    back = dequantize(q, scales, jnp.dtype(dtype))
    back = np.asarray(back, np.float64)
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(back[1], x[1], rtol=1 / 16)
    if np.isfinite(top):
      # Numbers too small for float32 may become zero, and nothing else.
      step = max(float(scales[0, 0]) * 2.0**-10, 2.0**-126)
      np.testing.assert_allclose(back[0], x[0], rtol=1 / 16, atol=step)
    else:
      np.testing.assert_array_equal(back[0, 0], top)
      self.assertTrue(np.isfinite(back[0, 1:]).all())

  def test_a_floor_is_the_least_that_a_block_counts_as(self):
    x = jnp.full((1, 128), 1e-6)
    _, scales = quantize(x, floor=ACTIVATION_FLOOR)
    np.testing.assert_allclose(scales, 1e-4 / 448, rtol=1e-6)
    _, scales = quantize(x)
    np.testing.assert_allclose(scales, 1e-6 / 448, rtol=1e-6)

  def test_a_gradient_is_refused(self):
    with self.assertRaisesRegex(NotImplementedError, 'no gradient'):
      jax.grad(lambda x: quantize(x)[1].sum())(jnp.ones((1, 128)))

  def test_bad_input_names_the_field(self):
    with self.assertRaisesRegex(ValueError, r'x is \[2, 100\]'):
      quantize(jnp.ones((2, 100)))
    with self.assertRaisesRegex(ValueError, r'scales \[3, 1\]'):
      dequantize(jnp.ones((4, 128)), jnp.ones((3, 1)))
    for floor in (-1e-4, np.nan, np.inf):
      with self.assertRaisesRegex(ValueError, f'floor = {floor}: must be 0'):
        quantize(jnp.ones((2, 128)), floor=floor)
    with self.assertRaisesRegex(NotImplementedError, r'blocks of \(1, 64\)'):
      quantize(jnp.ones((2, 128)), block=(1, 64), impl='gpu')


if __name__ == '__main__':
  absltest.main()
