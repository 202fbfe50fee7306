"""collapse_norm against loops in float64 and their gradients by hand."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.collapse_norm import collapse_norm
from pallas_kernels.collapse_norm.shapes import TEST
from tests.pallas_kernels import by_hand

EPS = 1e-6


def draw(shape, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  normal = lambda *size: rng.normal(size=size)
  return (
    jnp.asarray(normal(*shape), dtype),
    jnp.asarray(normal(*shape[:2]), jnp.float32),
    jnp.asarray(normal(shape.dim), jnp.float32),
    jnp.asarray(normal(shape.tokens, shape.dim), dtype),
  )


def in_float64(streams, pre, gain, grad):
  """The normed sums, and the three gradients, token by token."""
  streams, pre, gain, grad = (
    np.asarray(a, np.float64) for a in (streams, pre, gain, grad)
  )
  out, dstreams = np.zeros_like(grad), np.zeros_like(streams)
  dpre, dgain = np.zeros_like(pre), np.zeros_like(gain)
  for t in range(len(streams)):
    x = sum(w * s for w, s in zip(pre[t], streams[t]))
    root = np.sqrt((x * x).mean() + EPS)
    out[t] = x / root * gain
    dgain += grad[t] * x / root
    g = grad[t] * gain
    dx = g / root - x * (g * x).mean() / root**3
    for j, s in enumerate(streams[t]):
      dpre[t, j] = (s * dx).sum()
      dstreams[t, j] = pre[t, j] * dx
  return out, dstreams, dpre, dgain


class CollapseNormTest(parameterized.TestCase):
  @parameterized.product(name=sorted(TEST), dtype=(jnp.float32, jnp.bfloat16))
  def test_value_and_gradients_are_those_of_float64(self, name, dtype):
    *args, grad = draw(TEST[name], dtype)
    op = lambda *a: collapse_norm(*a, eps=EPS, impl='reference')
    by_hand.check(op, args, grad, in_float64(*args, grad))

  def test_bad_input_is_answered_in_a_line(self):
    streams, pre, gain, _ = draw(TEST['four'])
    with self.assertRaisesRegex(ValueError, r'pre is \[5, 3\]'):
      collapse_norm(streams, pre[:, :3], gain)
    with self.assertRaisesRegex(ValueError, r'gain is \[7\]'):
      collapse_norm(streams, pre, gain[:7])
    with self.assertRaisesRegex(NotImplementedError, 'width 512, not 1024'):
      collapse_norm(streams[..., :512], pre, gain[:512], impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'dtype float16'):
      collapse_norm(streams.astype(jnp.float16), pre, gain, impl='gpu')


if __name__ == '__main__':
  absltest.main()
