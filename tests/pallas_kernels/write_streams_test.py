"""write_streams against loops in float64 and their gradients by hand."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.write_streams import write_streams
from pallas_kernels.write_streams.shapes import TEST
from tests.pallas_kernels import by_hand


def draw(shape, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  N, n, D = shape
  sizes = (N, n, D), (N, D), (N, n), (N, n, n), (N, n, D)
  dtypes = dtype, dtype, jnp.float32, jnp.float32, dtype
  return [jnp.asarray(rng.normal(size=s), d) for s, d in zip(sizes, dtypes)]


def in_float64(streams, y, post, comb, grad):
  """The new streams, and the four gradients, pair by pair of streams."""
  streams, y, post, comb, grad = (
    np.asarray(a, np.float64) for a in (streams, y, post, comb, grad)
  )
  out, dstreams = np.zeros_like(streams), np.zeros_like(streams)
  dy, dpost, dcomb = map(np.zeros_like, (y, post, comb))
  N, n, _ = streams.shape
  for t in range(N):
    for k in range(n):
      out[t, k] += post[t, k] * y[t]
      dy[t] += post[t, k] * grad[t, k]
      dpost[t, k] = (y[t] * grad[t, k]).sum()
      for j in range(n):
        out[t, k] += comb[t, j, k] * streams[t, j]
        dstreams[t, j] += comb[t, j, k] * grad[t, k]
        dcomb[t, j, k] = (streams[t, j] * grad[t, k]).sum()
  return out, dstreams, dy, dpost, dcomb


class WriteStreamsTest(parameterized.TestCase):
  @parameterized.product(name=sorted(TEST), dtype=(jnp.float32, jnp.bfloat16))
  def test_value_and_gradients_are_those_of_float64(self, name, dtype):
    *args, grad = draw(TEST[name], dtype)
    op = lambda *a: write_streams(*a, impl='reference')
    by_hand.check(op, args, grad, in_float64(*args, grad))

  def test_bad_input_is_answered_in_a_line(self):
    streams, y, post, comb, _ = draw(TEST['two'])
    with self.assertRaisesRegex(ValueError, r'comb is \[3, 2\], but streams'):
      write_streams(streams, y, post, comb[..., 0])
    with self.assertRaisesRegex(ValueError, 'y is bfloat16, but'):
      write_streams(streams, y.astype(jnp.bfloat16), post, comb)
    with self.assertRaisesRegex(NotImplementedError, 'of width 100, not up'):
      write_streams(streams[..., :100], y[:, :100], post, comb, impl='gpu')
    half = (a.astype(jnp.float16) for a in (streams, y))
    with self.assertRaisesRegex(NotImplementedError, 'dtype float16'):
      write_streams(*half, post, comb, impl='gpu')


if __name__ == '__main__':
  absltest.main()
