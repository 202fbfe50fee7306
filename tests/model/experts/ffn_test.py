import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.experts.ffn import FFN, FFNConfig, swiglu
from tests import reference, tiny


def draw(width, dim=6):
  module = FFN(FFNConfig(width), dim, std=0.5, rngs=nnx.Rngs(0))
  return module, *(
    np.asarray(w[...], np.float64) for w in (module.gate_up, module.down)
  )


class FFNTest(parameterized.TestCase):
  # bfloat16 rounds three times to 8 bits: twice inside, once at the end.
  @parameterized.parameters((jnp.float32, 2e-6), (jnp.bfloat16, 1e-2))
  def test_equals_float64(self, dtype, tolerance):
    module = draw(10)[0]
    for name in ('gate_up', 'down'):
      weight = getattr(module, name)[...].astype(dtype)
      setattr(module, name, nnx.Param(weight))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), dtype)
    got, stats = module(x, None)
    self.assertEqual(got.dtype, dtype)
    self.assertEqual(stats, {})
    weights = (module.gate_up[...], module.down[...], x)
    want = reference.ffn(*(np.asarray(w, np.float64) for w in weights))
    self.assertLess(tiny.relative(got, want), tolerance)

  def test_gate_comes_first_and_alone_passes_the_silu(self):
    np.testing.assert_allclose(
      swiglu(jnp.array([2.0, -1.0, 3.0, 5.0])),
      [2 / (1 + np.exp(-2)) * 3, -1 / (1 + np.exp(1)) * 5],
      rtol=1e-6,
    )

  def test_shared_experts_are_one_wide_network(self):
    module, gate_up, down = draw(8)
    x = np.random.default_rng(0).normal(size=(1, 3, 6))
    parts = [slice(0, 4), slice(4, 8)]  # two experts of width 4
    want = sum(reference.ffn(gate_up[..., s], down[s], x) for s in parts)
    got = module(jnp.asarray(x, jnp.float32), None)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_width_0_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'width = 0'):
      FFNConfig(0)


if __name__ == '__main__':
  absltest.main()
