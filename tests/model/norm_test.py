import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from deepseek_jax.model.norm import RMSNorm
from tests import reference


def norm(dim=24, eps=1e-6):
  module = RMSNorm(dim, eps=eps, rngs=nnx.Rngs(0))
  scale = 1 + 0.3 * np.random.default_rng(1).normal(size=dim)
  module.scale = nnx.Param(jnp.asarray(scale, jnp.float32))
  return module, np.asarray(module.scale[...], np.float64)


class RMSNormTest(parameterized.TestCase):
  @parameterized.parameters((1e-6, 1.0), (1e-5, 1e-3), (1e-2, 0.1))
  def test_equals_float64(self, eps, size):
    x = size * np.random.default_rng(0).normal(size=(2, 3, 24))
    module, scale = norm(eps=eps)
    got = module(jnp.asarray(x, jnp.float32))
    want = reference.rms(np.float32(x), scale, eps)
    np.testing.assert_allclose(got, want, rtol=2e-6)

  def test_bfloat16_rounds_only_its_input_and_output(self):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 24)), jnp.bfloat16)
    module, scale = norm()
    got = module(x)
    self.assertEqual(got.dtype, jnp.bfloat16)
    want = reference.rms(np.asarray(x, np.float64), scale, 1e-6)
    # Half a unit in the last place of bfloat16 and nothing more.
    np.testing.assert_allclose(np.float64(got), want, rtol=2**-8 * 1.001)

  def test_starts_as_the_plain_norm(self):
    module = RMSNorm(5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.scale[...], np.ones(5))


if __name__ == '__main__':
  absltest.main()
