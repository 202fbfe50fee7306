import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.hf import fp8


def _by_blocks(weight, scale):
  """Element by element, in float64."""
  out = np.empty(weight.shape)
  for r in range(weight.shape[0]):
    for c in range(weight.shape[1]):
      out[r, c] = float(weight[r, c]) * float(scale[r // 128, c // 128])
  return out


class Fp8Test(parameterized.TestCase):
  @parameterized.product(
    shape=((128, 128), (300, 140), (576, 65), (1, 1)), ue8m0=(False, True)
  )
  def test_round_trip_stays_within_half_a_step(self, shape, ue8m0):
    draw = np.random.default_rng(0)
    scale = np.exp(draw.standard_normal((shape[0], 1)))
    weight = (draw.standard_normal(shape) * scale).astype(np.float32)
    quantized, scale = fp8.quantize(weight, ue8m0=ue8m0)
    self.assertEqual(scale.shape, fp8.scale_shape(shape))
    if ue8m0:
      np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
    back = fp8.dequantize(quantized, scale)
    np.testing.assert_allclose(back, _by_blocks(quantized, scale), rtol=1e-6)
    # Three bits of mantissa: half a step is 2^-4 of the number, and near
    # zero half of the smallest subnormal, 2^-10 scales.
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)
    spread = spread[: shape[0], : shape[1]]
    step = np.maximum(np.abs(weight) * 2.0**-4, spread * 2.0**-10)
    self.assertLessEqual((np.abs(back - weight) / step).max(), 1 + 1e-5)

  def test_quantizing_again_changes_nothing(self):
    weight = np.random.default_rng(0).standard_normal((200, 200))
    once = fp8.dequantize(*fp8.quantize(weight.astype(np.float32)))
    twice = fp8.dequantize(*fp8.quantize(once))
    np.testing.assert_allclose(twice, once, rtol=1e-6)

  def test_ue8m0_rounds_scales_up(self):
    exact = np.full((1, 1), 448.0 * 4, np.float32)
    self.assertEqual(fp8.quantize(exact, ue8m0=True)[1], 4)
    above = np.full((1, 1), 449.0 * 4, np.float32)
    self.assertEqual(fp8.quantize(above, ue8m0=True)[1], 8)

  def test_scales_of_powers_of_two_are_read(self):
    weight = np.ones((130, 2), fp8.E4M3)
    scale = np.array([[0.25], [8.0]]).astype(ml_dtypes.float8_e8m0fnu)
    back = fp8.dequantize(weight, scale)
    np.testing.assert_array_equal(back[:128], 0.25)
    np.testing.assert_array_equal(back[128:], 8.0)

  def test_part_from_the_middle_of_a_block(self):
    draw = np.random.default_rng(1)
    weight = draw.standard_normal((400, 300)).astype(np.float32)
    weight *= 1 + np.arange(300)
    quantized, scale = fp8.quantize(weight)
    whole = fp8.dequantize(quantized, scale)
    part = fp8.dequantize(
      quantized[200:300, 130:300], scale[1:3, 1:3], start=(200, 130)
    )
    np.testing.assert_array_equal(part, whole[200:300, 130:300])

  def test_zeros_stay_zeros_and_extremes_stay_finite(self):
    weight = np.zeros((128, 256), np.float32)
    weight[:, 128:] = np.finfo(np.float32).max
    back = fp8.dequantize(*fp8.quantize(weight))
    np.testing.assert_array_equal(back[:, :128], 0)
    np.testing.assert_allclose(back[:, 128:], weight[:, 128:], rtol=1e-6)
    tiny = np.full((1, 1), 1e-38, np.float32)
    self.assertTrue(np.isfinite(fp8.dequantize(*fp8.quantize(tiny))).all())

  @parameterized.parameters(np.nan, np.inf)
  def test_weight_that_is_not_finite_is_refused_by_name(self, value):
    weight = np.full((2, 2), value, np.float32)
    with self.assertRaisesRegex(InputError, 'layer.weight: holds a number'):
      fp8.quantize(weight, name='layer.weight')


if __name__ == '__main__':
  absltest.main()
