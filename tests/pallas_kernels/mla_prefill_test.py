"""mla_prefill against loops over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.mla_prefill import mla_prefill, segment_starts
from pallas_kernels.mla_prefill.shapes import TEST

D, V, SCALE = 12, 8, 0.4


def draw(shape):
  rng = np.random.default_rng(0)
  rows = [np.repeat(np.arange(len(s)), s) for s in shape.segments]
  segments = np.stack(rows).astype(np.int32)
  normal = lambda dim: rng.normal(size=(*segments.shape, shape.heads, dim))
  return normal(D), normal(D), normal(V), segments


def loop(q, k, v, segments):
  """One query at a time; keys chosen by comparing segment numbers."""
  out = np.zeros(v.shape)
  for b, t, h in np.ndindex(q.shape[:3]):
    keys = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    scores = SCALE * k[b, keys, h] @ q[b, t, h]
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ v[b, keys, h] / weights.sum()
  return out


jitted = jax.jit(functools.partial(mla_prefill, scale=SCALE, impl='reference'))


class MlaPrefillTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_value_and_gradient_equal_a_loop_in_float64(self, shape):
    q, k, v, segments = draw(shape)
    narrow = [a.astype(np.float32) for a in (q, k, v)]
    got, pull = jax.vjp(lambda *a: jitted(*a, segments), *narrow)
    np.testing.assert_allclose(
      got, loop(q, k, v, segments), rtol=2e-5, atol=2e-5
    )
    weight = np.cos(np.arange(got.size)).reshape(got.shape)
    rng = np.random.default_rng(1)
    ways = [rng.normal(size=a.shape) for a in (q, k, v)]
    grads = pull(jnp.asarray(weight, jnp.float32))
    ahead = [a + 1e-5 * way for a, way in zip((q, k, v), ways)]
    behind = [a - 1e-5 * way for a, way in zip((q, k, v), ways)]
    change = loop(*ahead, segments) - loop(*behind, segments)
    slope = (change * weight).sum() / 2e-5
    along = sum((g * way).sum() for g, way in zip(grads, ways))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)

  def test_without_segments_a_row_is_one_segment(self):
    q, k, v, segments = (a.astype(np.float32) for a in draw(TEST['ragged']))
    one = np.zeros(segments.shape, np.int32)
    np.testing.assert_array_equal(
      mla_prefill(q, k, v, scale=SCALE), jitted(q, k, v, one)
    )
    other = jitted(q, k, v, segments.astype(np.int32))
    self.assertGreater(np.abs(other[0] - jitted(q, k, v, one)[0]).max(), 0.01)

  def test_a_number_that_comes_back_starts_a_new_segment(self):
    segments = jnp.asarray([[5, 5, 7, 5, 5, 5], [1, 2, 2, 2, 3, 3]])
    np.testing.assert_array_equal(
      segment_starts(segments), [[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 4, 4]]
    )

  def test_unsupported_kernel_shape_says_why(self):
    q, k, v, segments = draw(TEST['one_token'])
    with self.assertRaisesRegex(NotImplementedError, 'dtype float32'):
      narrow = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
      mla_prefill(*narrow, segments, scale=1.0, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'dims 12 and 8'):
      narrow = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
      mla_prefill(*narrow, segments, scale=1.0, impl='gpu')

  def test_bad_shapes_name_the_field(self):
    q, k, v, segments = draw(TEST['one_segment'])
    with self.assertRaisesRegex(ValueError, 'differ in B T H'):
      mla_prefill(q, k[:, 1:], v, scale=1.0)
    with self.assertRaisesRegex(ValueError, r'segments are \[1, 12\]'):
      mla_prefill(q, k, v, segments[:, 1:], scale=1.0)


if __name__ == '__main__':
  absltest.main()
