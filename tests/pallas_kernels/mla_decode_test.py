"""mla_decode against loops in float64."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import compat, latent_blocks
from pallas_kernels.latent_blocks import EMPTY
from pallas_kernels.mla_decode import bf16_latents, gpu, mla_decode
from pallas_kernels.mla_decode.shapes import TEST, Shape

SMALL = {
  **{name: shape._replace(heads=2, page=4) for name, shape in TEST.items()},
  'empty': Shape((0, 5), 1, 2, 4),
}
C, R, SCALE = 16, 8, 0.3
jitted = jax.jit(functools.partial(mla_decode, scale=SCALE, impl='reference'))


def draw(shape, seed=0):
  rng = np.random.default_rng(seed)
  B, J = len(shape.lengths), -(-max(shape.lengths) // shape.page)
  pages = B * J + 2
  table = rng.permutation(pages)[: B * J].reshape(B, J).astype(np.int32)
  normal = lambda *size: rng.normal(size=size).astype(np.float32)
  arrays = [
    normal(B, shape.new, shape.heads, C),
    normal(B, shape.new, shape.heads, R),
    normal(pages, shape.page, C),
    normal(pages, shape.page, R),
  ]
  return [*arrays, table, np.asarray(shape.lengths, np.int32)]


def loop(q_c, q_r, c, k_r, table, lengths):
  """One query at a time, keys found by page and offset, in float64."""
  out = np.zeros(q_c.shape)
  for b, t, h in np.ndindex(q_c.shape[:3]):
    seen = lengths[b] - (q_c.shape[1] - 1 - t)
    if seen <= 0:
      continue
    where = [(table[b, i // c.shape[1]], i % c.shape[1]) for i in range(seen)]
    keys = np.stack([c[p] for p in where]).astype(np.float64)
    shared = np.stack([k_r[p] for p in where]).astype(np.float64)
    scores = SCALE * (keys @ q_c[b, t, h] + shared @ q_r[b, t, h])
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ keys / weights.sum()
  return out


class MlaDecodeTest(parameterized.TestCase):
  @parameterized.named_parameters(SMALL.items())
  def test_reference_equals_a_loop_in_float64(self, shape):
    args = draw(shape)
    got = jitted(*args)
    np.testing.assert_allclose(got, loop(*args), rtol=2e-5, atol=2e-5)

  def test_tokens_behind_the_length_do_not_count_even_if_nan(self):
    args = draw(Shape((5, 9), 2, 2, 4))
    want = jitted(*args)
    c, k_r, table, lengths = args[2:]
    for b, length in enumerate(lengths):
      for i in range(length, table.shape[1] * 4):
        c[table[b, i // 4], i % 4] = np.nan
        k_r[table[b, i // 4], i % 4] = np.nan
    got = jitted(*args)
    np.testing.assert_array_equal(got, want)

  @parameterized.named_parameters(SMALL.items())
  def test_float8_latents_count_times_their_scales(self, shape):
    q_c, q_r, _, k_r, table, lengths = draw(shape)
    rng = np.random.default_rng(1)
    wide = 256  # two scales each
    q_c = rng.normal(size=(*q_c.shape[:3], wide)).astype(np.float32) / 4
    c = rng.normal(size=(*k_r.shape[:2], wide))
    c = c.astype(ml_dtypes.float8_e4m3fn)
    scales = (rng.random((*k_r.shape[:2], 2)) + 0.5).astype(np.float32)
    rest = table, lengths
    got = jitted(q_c, q_r, jnp.asarray(c), k_r, *rest, scales=scales)
    exact = c.astype(np.float64) * np.repeat(scales, 128, axis=-1)
    want = loop(q_c, q_r, exact, k_r, *rest)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)

  @parameterized.parameters(
    ({}, 'dtype float32'),
    ({'dtype': jnp.bfloat16}, 'latent 16 and rope 8'),
  )
  def test_unsupported_kernel_shape_says_why(self, change, reason):
    args = draw(TEST['one_token'])
    floats = [jnp.asarray(a, change.get('dtype')) for a in args[:4]]
    with self.assertRaisesRegex(NotImplementedError, reason):
      mla_decode(*floats, *args[4:], scale=SCALE, impl='gpu')

  def test_splits_add_up_to_the_whole_whichever_are_empty(self):
    rng = np.random.default_rng(3)
    scores = 20 * rng.normal(size=(2, 3, 5, 7))  # row, split, head, key
    values = rng.normal(size=(2, 3, 7, 4))
    scores[0, 1], scores[1, :, 2] = -np.inf, -np.inf
    powers = np.exp2(scores)
    sums = powers.sum(-1)
    parts = np.einsum('bshk,bskc->bshc', powers, values)
    parts /= np.where(sums > 0, sums, 1)[..., None]
    lse = np.where(sums > 0, np.log2(np.where(sums > 0, sums, 1)), EMPTY)
    got, whole = latent_blocks.merge(
      jnp.asarray(parts, jnp.float32), jnp.asarray(lse, jnp.float32)
    )
    total = sums.sum(1)
    want = np.einsum('bshk,bskc->bhc', powers, values)
    want /= np.where(total > 0, total, 1)[..., None]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    logs = np.where(total > 0, np.log2(np.where(total > 0, total, 1)), EMPTY)
    np.testing.assert_allclose(whole, logs, rtol=2e-6)

  @parameterized.parameters((2, [1, 3, 2, 0]), (4, [0, 1, 2, 3]))
  def test_the_longest_start_first_where_not_all_start_at_once(
    self, sms, order
  ):
    lengths = np.asarray([3, 200, 64, 130], np.int32)
    args = draw(Shape(tuple(lengths), 1, 16, 64))
    bf16 = lambda *size: jnp.zeros(size, jnp.bfloat16)
    pages = args[2].shape[:2]
    run = mock.Mock(
      return_value=(bf16(4, 1, 64, 512), jnp.zeros((4, 1, 64), jnp.float32))
    )
    device = mock.patch.object(compat, 'num_sms', lambda: sms)
    with mock.patch.object(bf16_latents, 'partial_sums', run), device:
      gpu.mla_decode(
        bf16(4, 1, 16, 512),
        bf16(4, 1, 16, 64),
        bf16(*pages, 512),
        bf16(*pages, 64),
        jnp.asarray(args[4]),
        jnp.asarray(lengths),
        SCALE,
        None,
        1,
      )
    requests = run.call_args.args[2]
    np.testing.assert_array_equal(requests.order, order)
    np.testing.assert_array_equal(requests.lengths, lengths)

  def test_a_scale_that_is_not_above_0_is_left_to_the_reference(self):
    args = draw(TEST['one_token'])
    with self.assertRaisesRegex(NotImplementedError, 'scale -1.0'):
      mla_decode(*args, scale=-1.0, impl='gpu')

  def test_bad_shapes_name_the_field(self):
    args = draw(TEST['one_token'])
    args[5] = np.zeros(7, np.int32)
    with self.assertRaisesRegex(ValueError, r'lengths is \[7\].*ask for \[1\]'):
      mla_decode(*args, scale=SCALE)
    with self.assertRaisesRegex(ValueError, r'scales is \[3, 64\]'):
      mla_decode(*draw(TEST['one_token']), scale=SCALE, scales=np.ones((3, 64)))
    with self.assertRaisesRegex(ValueError, "impl='fast'"):
      mla_decode(*draw(TEST['one_token']), scale=SCALE, impl='fast')


if __name__ == '__main__':
  absltest.main()
