"""mla_prefill against loops over queries in float64."""

import functools
import logging
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import compat, dispatch
from pallas_kernels.mla_prefill import (
  backward,
  causal_output,
  mla_prefill,
  segment_starts,
)
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

  def test_the_kernel_takes_no_scale_that_would_turn_maxima_around(self):
    q = jnp.zeros((1, 8, 1, 192), jnp.bfloat16)
    for scale in (0.0, -0.1, float('nan')):
      with self.assertRaisesRegex(NotImplementedError, 'not above 0'):
        mla_prefill(q, q, q[..., :128], scale=scale, impl='gpu')

  def test_the_interpreter_needs_a_thread_for_each_warpgroup(self):
    q = jnp.zeros((1, 8, 1, 192), jnp.bfloat16)
    with (
      mock.patch.dict(os.environ, {'NPROC': '2'}),
      compat.interpreted(),
      self.assertRaisesRegex(RuntimeError, '3 warpgroups.*set NPROC=8'),
    ):
      mla_prefill(q, q, q[..., :128], scale=0.1, impl='gpu')

  def test_profiles_show_a_kernel_by_its_module_and_function(self):
    names = {
      causal_output._body: 'mla_prefill_causal_output',
      functools.partial(backward._keys_body, scale=1.0): (
        'mla_prefill_backward_keys'
      ),
    }
    for body, name in names.items():
      self.assertEqual(compat._named(body).__name__, name)

  def test_without_cudnn_the_reason_is_logged_once(self):
    dispatch.say_once.cache_clear()
    q, k, v, segments = (a.astype(np.float32) for a in draw(TEST['ragged']))
    segments = segments.astype(np.int32)
    with self.assertLogs('pallas_kernels', logging.WARNING) as logs:
      for _ in range(2):
        got = mla_prefill(q, k, v, scale=SCALE, impl='cudnn')
        mla_prefill(q, k, v, segments, scale=SCALE, impl='cudnn')
    self.assertLen(logs.output, 2)
    self.assertIn('no cuDNN: the target, cpu, is not', logs.output[0])
    self.assertIn('not given packed segments', logs.output[1])
    np.testing.assert_array_equal(got, mla_prefill(q, k, v, scale=SCALE))

  @parameterized.parameters(192, 128)
  def test_on_hopper_cudnn_is_called_forward_and_backward(self, width):
    from jax._src.cudnn import fused_attention_stablehlo as private

    shape = jax.ShapeDtypeStruct((1, 256, 2, width), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

    def both(q, k, v):
      fn = functools.partial(mla_prefill, scale=SCALE, impl='cudnn')
      out, pull = jax.vjp(fn, q, k, v)
      return out, pull(out)

    with (
      mock.patch.object(dispatch, 'on_hopper', lambda: True),
      # They ask a GPU, of which there is none here.
      mock.patch.object(private, 'check_cudnn_version', lambda: 91200),
      mock.patch.object(private, 'check_compute_capability', lambda _: True),
    ):
      traced = jax.jit(both).trace(shape, shape, values)
      text = traced.lower(lowering_platforms=('cuda',)).as_text()
    self.assertEqual(text.count('__cudnn$fmhaSoftmaxBackward'), 1)
    self.assertEqual(text.count('__cudnn$fmhaSoftmax('), 1)

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
