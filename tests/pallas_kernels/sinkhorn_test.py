"""sinkhorn against loops in float64 and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.sinkhorn import sinkhorn
from pallas_kernels.sinkhorn.shapes import TEST

EPS = 1e-6


def draw(shape):
  rng = np.random.default_rng(0)
  size = (shape.tokens, shape.streams, shape.streams)
  return rng.normal(size=size) * 2, rng.normal(size=size)


def loop(logits, iterations):
  """One matrix at a time, line by line, in float64."""
  out = []
  for x in logits:
    m = np.stack([np.exp(row) / np.exp(row).sum() for row in x]) + EPS
    for k in range(2 * iterations - 1):
      lines = m.T if k % 2 == 0 else m  # columns first and last
      lines = np.stack([line / (line.sum() + EPS) for line in lines])
      m = lines.T if k % 2 == 0 else lines
    out.append(m)
  return np.stack(out)


class SinkhornTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_reference_equals_a_loop_in_float64(self, shape):
    logits, _ = draw(shape)
    got = sinkhorn(jnp.asarray(logits), iterations=shape.iterations)
    want = loop(logits, shape.iterations)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  @parameterized.named_parameters(TEST.items())
  def test_gradient_equals_central_differences_in_float64(self, shape):
    logits, way = draw(shape)
    weight = np.cos(np.arange(logits.size)).reshape(logits.shape)

    def value(x):
      return (sinkhorn(x, iterations=shape.iterations) * weight).sum()

    grad = jax.jit(jax.grad(value))(jnp.asarray(logits, jnp.float32))
    along = lambda t: loop(logits + t * way, shape.iterations)
    slope = ((along(1e-4) - along(-1e-4)) / 2e-4 * weight).sum()
    np.testing.assert_allclose((grad * way).sum(), slope, rtol=1e-3)

  def test_columns_sum_to_one_and_rows_nearly(self):
    m = sinkhorn(jnp.asarray(draw(TEST['v4'])[0]))
    # A sum s leaves s / (s + eps), and after many rounds s is about 1.
    np.testing.assert_allclose(m.sum(1), 1, atol=2e-6)
    np.testing.assert_allclose(m.sum(2), 1, atol=0.05)
    self.assertGreater(float(abs(m.sum(2) - 1).max()), 1e-4)

  def test_bad_input_names_the_field(self):
    with self.assertRaisesRegex(ValueError, r'logits are \[2, 3, 4\]'):
      sinkhorn(jnp.zeros((2, 3, 4)))
    with self.assertRaisesRegex(ValueError, 'iterations=0'):
      sinkhorn(jnp.zeros((2, 4, 4)), iterations=0)
    with self.assertRaisesRegex(NotImplementedError, '5 streams'):
      sinkhorn(jnp.zeros((2, 5, 5)), impl='gpu')


if __name__ == '__main__':
  absltest.main()
