"""index_candidates against loops over queries and keys in float64."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import compat
from pallas_kernels.index_candidates import gpu, index_candidates, reference
from pallas_kernels.index_candidates.shapes import TEST, TEST_GPU, blocks
from pallas_kernels.indexer import indexer

I = 6


def draw(shape, whole=True):
  """Small integers, so that equal scores are common."""
  rng = np.random.default_rng(0)
  B, T, S, H = shape.batch, shape.queries, shape.keys, shape.heads
  draw = lambda *size: (
    rng.integers(-2, 3, size) if whole else rng.normal(size=size)
  )
  arrays = draw(B, T, H, I), draw(B, S, I), draw(B, T, H)
  return *(a.astype(np.float32) for a in arrays), *blocks(shape)


def choose(shape, impl=None):
  how = {'size': shape.size, 'top_k': shape.top_k, 'impl': impl}
  return jax.jit(functools.partial(index_candidates, **how))


def loop(shape, q, k, w, starts, last):
  """One query and key at a time; sorted by score, then by position."""
  out = np.full((*last.shape, shape.top_k), -1)
  for b, t in np.ndindex(*last.shape):
    ranked = []
    for start in starts[b, t]:
      end = min(start + shape.size, last[b, t], k.shape[1])
      for s in range(start, end if start >= 0 else start):
        products = q[b, t].astype(np.float64) @ k[b, s]
        ranked.append((-(w[b, t] * np.maximum(products, 0)).sum(), s))
    chosen = sorted(s for _, s in sorted(ranked)[: shape.top_k])
    out[b, t, : len(chosen)] = chosen
  return out


class IndexCandidatesTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_reference_equals_a_loop_and_ties_go_to_the_lowest(self, shape):
    for whole in (True, False):
      args = draw(shape, whole)
      got = choose(shape)(*args)
      np.testing.assert_array_equal(got, loop(shape, *args))

  def test_of_all_blocks_it_is_the_indexers_choice(self):
    shape = TEST['anywhere']
    q, k, w, _, last = draw(shape, whole=False)
    starts = np.arange(0, shape.keys, shape.size, dtype=np.int32)
    starts = np.broadcast_to(starts, (*last.shape, len(starts)))
    want = indexer(q, k, w, np.zeros_like(last), last, top_k=shape.top_k)
    got = choose(shape)(q, k, w, starts, last)
    np.testing.assert_array_equal(got, want)

  def test_blocks_that_are_none_may_stand_anywhere(self):
    shape = TEST['plain']
    q, k, w, starts, last = draw(shape)
    want = loop(shape, q, k, w, starts, last)
    spread = np.full((*last.shape, 2 * shape.count), -1, np.int32)
    spread[..., 1::2] = starts
    for none in (-1, -(2**31), shape.keys, 2**31 - 1):
      given = np.where(spread < 0, none, spread).astype(np.int32)
      got = choose(shape)(q, k, w, given, last)
      np.testing.assert_array_equal(got, want)

  def test_a_score_of_nan_is_none(self):
    shape = TEST['plain']
    q, k, w, starts, last = draw(shape)
    k[:, 5] = np.nan
    got = choose(shape)(q, k, w, starts, last)
    self.assertFalse((np.asarray(got) == 5).any())
    self.assertTrue((np.asarray(got) == 4).any())

  def test_few_queries_at_a_time_choose_alike(self):
    shape = TEST['anywhere']
    args = draw(shape)
    want = choose(shape)(*args)
    with mock.patch.object(reference, '_ENTRIES', 7 * 24 * I):
      got = choose(shape)(*args)
    np.testing.assert_array_equal(got, want)

  def test_neither_gathered_keys_nor_scores_of_all_queries_are_made(self):
    T, S, H, count, size = 512, 4096, 64, 8, 64
    of = jax.ShapeDtypeStruct
    args = of((1, T, H, 128), 'float32'), of((1, S, 128), 'float32')
    args += of((1, T, H), 'float32'), of((1, T, count), 'int32')
    run = functools.partial(index_candidates, size=size, top_k=16)
    made = jax.jit(functools.partial(run, impl='reference'))
    text = made.lower(*args, of((1, T), 'int32')).as_text()
    some = reference._ENTRIES // (count * size * 128)
    self.assertLess(some, T)
    self.assertIn(f'tensor<{some}x{count * size}x128xf32>', text)
    self.assertNotIn(f'{T}x{count * size}x128xf32', text)
    self.assertNotIn(f'{T}x{H}x{count * size}xf32', text)

  @parameterized.named_parameters(TEST_GPU.items())
  def test_runs_of_the_kernel_are_the_candidates_and_within_the_keys(
    self, shape
  ):
    starts, last = (a.reshape(-1, *a.shape[2:]) for a in blocks(shape))
    run = min(shape.size, 64)
    runs = gpu._runs(jnp.asarray(starts), last, shape.size, run, shape.keys)
    first, low, high = map(np.asarray, runs)
    self.assertEqual(first.shape[1] * run % 64, 0)
    self.assertGreaterEqual(first.min(), 0)
    self.assertLessEqual(first.max() + run, shape.keys)
    for n, end in enumerate(last):
      found = [
        at
        for begin, i, j in zip(first[n], low[n], high[n])
        for at in range(begin + i, begin + j)
      ]
      want = [
        at
        for start in starts[n][starts[n] >= 0]
        for at in range(start, min(start + shape.size, end))
      ]
      self.assertEqual(found, want)

  @parameterized.parameters(
    (1, 128, 32),  # four tiles each
    (64, 128, 8),
    (300, 128, 1),  # enough queries to fill most of the device
    (1, 3, 1),  # nothing to share
  )
  def test_few_queries_share_their_candidates(self, queries, tiles, parts):
    with mock.patch.object(compat, 'num_sms', lambda: 132):
      self.assertEqual(gpu._parts(queries, tiles), parts)

  def test_unsupported_kernel_shapes_say_why(self):
    shape = TEST_GPU['tiles']
    q, k, w, starts, last = draw(shape)
    half = lambda *size: jnp.zeros(size, jnp.bfloat16)
    fit = half(2, 2, 8, 128), half(2, 400, 128), w, starts, last
    run = functools.partial(index_candidates, top_k=2, impl='gpu')
    for args, size, why in (
      ((q, k, w, starts, last), 64, 'dtype float32/float32'),
      ((half(*q.shape), half(*k.shape), *fit[2:]), 64, '8 heads of 6, not'),
      ((half(2, 2, 12, 128), fit[1], half(2, 2, 12), *fit[3:]), 64, '12 heads'),
      (fit, 4, 'blocks of 4 keys, not of 8, 16, 32 or a multiple of 64'),
      (fit, 24, 'blocks of 24 keys'),
      (fit, 96, 'blocks of 96 keys'),
      ((fit[0], half(2, 60, 128), *fit[2:]), 64, '60 keys, fewer than 64'),
    ):
      with self.assertRaisesRegex(NotImplementedError, why):
        run(*args, size=size)

  def test_bad_input_names_the_field(self):
    q, k, w, starts, last = draw(TEST['plain'])
    run = functools.partial(index_candidates, size=4, top_k=2)
    with self.assertRaisesRegex(ValueError, r'w is \[2, 17\], but q'):
      run(q, k, w[..., 0], starts, last)
    with self.assertRaisesRegex(ValueError, r'starts is \[2, 16, 3\], but q'):
      run(q, k, w, starts[:, 1:], last)
    with self.assertRaisesRegex(ValueError, r'last is \[1, 17\], but q'):
      run(q, k, w, starts, last[:1])
    with self.assertRaisesRegex(ValueError, 'top_k=0'):
      run(q, k, w, starts, last, top_k=0)
    with self.assertRaisesRegex(ValueError, 'size=0'):
      run(q, k, w, starts, last, size=0)


if __name__ == '__main__':
  absltest.main()
