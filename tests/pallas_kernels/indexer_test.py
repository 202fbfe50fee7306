"""indexer against loops over queries and keys in float64."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import compat
from pallas_kernels.indexer import bits, indexer, reference, shared_keys
from pallas_kernels.indexer.shapes import TEST
from pallas_kernels.ordered import NOTHING
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize.reference import FP8

I = 6


def draw(shape, whole=True):
  """Small integers, so that equal scores are common."""
  rng = np.random.default_rng(0)
  B, T, S, H = shape.batch, shape.queries, shape.keys, shape.heads
  draw = lambda *size: (
    rng.integers(-2, 3, size) if whole else rng.normal(size=size)
  )
  arrays = draw(B, T, H, I), draw(B, S, I), draw(B, T, H)
  last = np.broadcast_to(np.arange(S - T, S) + 1, (B, T)).astype(np.int32)
  first = last // 2 if shape.packed else np.zeros_like(last)
  return *(a.astype(np.float32) for a in arrays), first, last


def rounded(a, power_of_two=True):
  """Returns vectors [... I] in float8, and their scales [...] float32."""
  codes, scales = quantize(
    jnp.asarray(a.reshape(-1, I), jnp.float32),
    block=(1, I),
    power_of_two=power_of_two,
    impl='reference',
  )
  return codes.reshape(a.shape), scales.reshape(a.shape[:-1])


def loop(q, k, w, first, last, top_k, q_scale=None, k_scale=None):
  """One query and key at a time; sorted by score, then by position."""
  q, k = (np.asarray(a, np.float64) for a in (q, k))
  if q_scale is not None:
    w = w * np.asarray(q_scale, np.float64)
  if k_scale is not None:
    # Scales are positive: of the keys, or of their sums, is all the same.
    k = k * np.asarray(k_scale, np.float64)[..., None]
  B, T = first.shape
  out = np.full((B, T, top_k), -1)
  for b, t in np.ndindex(B, T):
    ranked = []
    for s in range(first[b, t], last[b, t]):
      products = q[b, t].astype(np.float64) @ k[b, s]
      ranked.append((-(w[b, t] * np.maximum(products, 0)).sum(), s))
    chosen = sorted(s for _, s in sorted(ranked)[:top_k])
    out[b, t, : len(chosen)] = chosen
  return out


class IndexerTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_reference_equals_a_loop_and_ties_go_to_the_lowest(self, shape):
    for whole in (True, False):
      args = draw(shape, whole)
      got = jax.jit(functools.partial(indexer, top_k=shape.top_k))(*args)
      np.testing.assert_array_equal(got, loop(*args, shape.top_k))

  @parameterized.named_parameters(TEST.items())
  def test_float8_equals_a_loop_over_the_same_numbers(self, shape):
    for whole, power in ((True, True), (False, True), (False, False)):
      q, k, w, *span = draw(shape, whole)
      # Vectors of any size: without its scale each would weigh the same.
      rng = np.random.default_rng(1)
      q, k = (
        a * 2.0 ** rng.integers(-6, 7, (*a.shape[:-1], 1)) for a in (q, k)
      )
      (q, q_scale), (k, k_scale) = (rounded(a, power) for a in (q, k))
      scales = {'q_scale': q_scale, 'k_scale': k_scale}
      args = q, k, w, *span
      got = jax.jit(functools.partial(indexer, top_k=shape.top_k))(
        *args, **scales
      )
      np.testing.assert_array_equal(got, loop(*args, shape.top_k, **scales))

  def test_one_side_may_be_float8(self):
    q, k, w, *span = draw(TEST['causal'], whole=False)
    (q8, q_scale), (k8, k_scale) = rounded(q), rounded(k)
    for args, scales in (
      ((q8, k), {'q_scale': q_scale}),
      ((q, k8), {'k_scale': k_scale}),
    ):
      got = indexer(*args, w, *span, top_k=8, **scales)
      np.testing.assert_array_equal(got, loop(*args, w, *span, 8, **scales))

  @parameterized.parameters(1, 7, 40, 128)
  def test_the_best_integers_as_bits_equal_a_stable_sort(self, top_k):
    rng = np.random.default_rng(top_k)
    N, S = 6, 128
    x = rng.integers(-(2**31) + 1, 2**31 - 1, (N, S)).astype(np.int32)
    x[1] //= 2**29  # many ties
    x[2] = 5
    x[3, ::3], x[4] = NOTHING, NOTHING  # fewer than are asked for, none
    x[4, 9] = -7
    want = np.zeros((N, S), np.uint8)
    for n in range(N):
      order = np.argsort(-x[n].astype(np.int64), kind='stable')[:top_k]
      want[n, [i for i in order if x[n, i] != NOTHING]] = 1
    # What a CPU gets, and what others get.
    for level in (bits._by_bits, bits._by_digits):
      with mock.patch.object(bits, '_level', level):
        words = np.asarray(bits.best(jnp.asarray(x), top_k))
      got = np.unpackbits(words.view(np.uint8), axis=1, bitorder='little')
      np.testing.assert_array_equal(got, want)

  @parameterized.parameters(
    (1, 2048, 256),  # two for each of 132 multiprocessors, 8 rows each
    (66, 2048, 4),
    (67, 2048, 1),  # enough pairs to fill most of the device
    (1, 8, 1),  # nothing to share
  )
  def test_few_queries_share_their_keys(self, pairs, rows, parts):
    with mock.patch.object(compat, 'num_sms', lambda: 132):
      self.assertEqual(shared_keys.parts(pairs, rows), parts)

  def test_by_default_a_query_sees_itself_and_what_is_before(self):
    shape = TEST['causal']
    q, k, w, first, last = draw(shape)
    np.testing.assert_array_equal(
      indexer(q, k, w, top_k=4), indexer(q, k, w, first, last, top_k=4)
    )

  def test_no_array_of_all_scores_is_made(self):
    T, S, H = 512, 4096, 64
    shapes = [(1, T, H, 128), (1, S, 128), (1, T, H)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    run = functools.partial(indexer, top_k=16, impl='reference')
    text = (
      jax.jit(
        lambda q, k, w: run(
          q, k, w, jnp.zeros((1, T), jnp.int32), jnp.full((1, T), S, jnp.int32)
        )
      )
      .lower(*args)
      .as_text()
    )
    size = reference._ENTRIES // (H * S)
    self.assertIn(f'tensor<{size}x1x{S}xf32>', text)
    self.assertNotIn(f'{T}x{S}xf32', text)
    self.assertNotIn(f'{T}x1x{S}xf32', text)

  @parameterized.parameters((1, 5), (3, 40), (7, 3), (33, 200))
  def test_set_bits_become_ascending_positions(self, words, count):
    rng = np.random.default_rng(words)
    mask = rng.random((9, words * 32)) < rng.choice([0, 0.1, 0.9, 1], (9, 1))
    packed = (mask.reshape(9, words, 32) << np.arange(32)).sum(-1)
    got = bits.positions(jnp.asarray(packed.astype(np.uint32)), count)
    want = np.full((9, count), -1)
    for row, line in enumerate(mask):
      where = np.flatnonzero(line)[:count]
      want[row, : len(where)] = where
    np.testing.assert_array_equal(got, want)

  def test_unsupported_kernel_shape_says_why(self):
    q, k, w, first, last = draw(TEST['causal'])
    with self.assertRaisesRegex(NotImplementedError, 'dtype float32'):
      indexer(q, k, w, first, last, top_k=2, impl='gpu')
    q, k = (jnp.asarray(a, jnp.bfloat16) for a in (q, k))
    with self.assertRaisesRegex(NotImplementedError, '3 heads of 6'):
      indexer(q, k, w, first, last, top_k=2, impl='gpu')
    # Tensor cores multiply float8 by float8 alone.
    k, scales = k.astype(FP8), jnp.ones(k.shape[:2])
    how = {'top_k': 2, 'k_scale': scales, 'impl': 'gpu'}
    with self.assertRaisesRegex(
      NotImplementedError, 'bfloat16/float8_e4m3fn, not bfloat16 or both float8'
    ):
      indexer(q, k, w, first, last, **how)

  def test_bad_input_names_the_field(self):
    q, k, w, first, last = draw(TEST['causal'])
    with self.assertRaisesRegex(ValueError, r'w is \[2, 37\], but q'):
      indexer(q, k, w[..., 0], first, last, top_k=2)
    for name in ('q', 'k'):
      wide = {'q': q, 'k': k}
      narrow = wide | {name: jnp.asarray(wide[name], FP8)}
      shape = wide[name].shape[:-1]
      for arrays, scale, line in (
        (wide, np.ones(shape), f'{name} is float32 with a scale'),
        (narrow, None, f'{name} is float8_e4m3fn with no scale'),
        (narrow, np.ones(shape)[..., 1:], f'{name}_scale is .*, but {name} '),
      ):
        scales = {f'{name}_scale': scale}
        with self.assertRaisesRegex(ValueError, line) as caught:
          indexer(*arrays.values(), w, first, last, top_k=2, **scales)
        self.assertNotIn('\n', str(caught.exception))
    with self.assertRaisesRegex(ValueError, 'top_k=0'):
      indexer(q, k, w, first, last, top_k=0)


if __name__ == '__main__':
  absltest.main()
