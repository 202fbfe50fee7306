"""The best of many scores, in two levels and by chunks: exactly the best."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.model.attention import candidates as lib
from deepseek_jax.model.attention import indexer
from deepseek_jax.model.attention.indexer import IndexQuery, choose
from deepseek_jax.model.attention.query_blocks import Visibility


def scores(kind, rows, count, seed=0):
  rng = np.random.default_rng(seed)
  if kind == 'ties':  # few values: most comparisons are ties
    return rng.integers(0, 3, (rows, count)).astype(np.float32)
  if kind == 'rare':  # one group is best, and equals lie before and in it
    out = np.zeros((rows, count), np.float32)
    out[:, -3] = 1
    return out
  out = rng.normal(size=(rows, count)).astype(np.float32)
  if kind == 'masked':  # some rows see fewer than k
    seen = rng.integers(1, count, (rows, 1))
    out[np.arange(count) >= seen] = -np.inf
  if kind == 'sorted':
    out.sort(axis=-1)
  if kind == 'nan':
    out[rng.random(out.shape) < 0.1] = np.nan
  if kind == 'infinite':
    out[rng.random(out.shape) < 0.1] = np.inf
  return out


def best(flat, k):
  """Places of the k greatest by a stable sort, ascending, then -1."""
  flat = np.asarray(flat)
  out = np.full((len(flat), k), -1)
  for row, values in enumerate(flat):
    values = np.where(values > -np.inf, values, -np.inf)  # nan too
    at = np.argsort(-values, kind='stable')[:k]
    at = np.sort(at[values[at] > -np.inf])
    out[row, : len(at)] = at
  return out


class TopTest(parameterized.TestCase):
  @parameterized.product(
    kind=('normal', 'ties', 'rare', 'masked', 'sorted', 'infinite', 'nan'),
    size=((1, 130), (2, 256), (2, 263), (3, 400), (3, 16)),
  )
  def test_equals_one_level(self, kind, size):
    k, count = size
    flat = scores(kind, 5, count)
    want = best(flat, k)
    for few in (0, 1 << 30):  # by counts, by a heap
      with mock.patch.object(lib, '_FEW', few):
        got = lib.best(jnp.asarray(flat), k)
      np.testing.assert_array_equal(got, want)

  def test_few_numbers_are_looked_through(self):
    """About 2 sqrt(S k), where one level has S."""
    for count in (1 << 14, 1 << 16, 1 << 18):
      size = lib.group_size(count, 64)
      seen = count / size + 64 * size
      self.assertLess(seen, 2.2 * (count * 64) ** 0.5)
    self.assertEqual(lib.group_size(15 * 64, 64), 1)

  @parameterized.parameters('normal', 'ties', 'rare')
  def test_groups_of_any_size_are_exact(self, kind):
    flat = jnp.asarray(scores(kind, 4, 96))
    for size in (1, 2, 4, 8, 16):
      tops = flat.reshape(4, -1, size).max(axis=-1)
      got = lib.of_groups(flat, tops, 6)
      np.testing.assert_array_equal(got, best(flat, 6))


class ChunksTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(lib, 'CHUNK', 16))
    self.enter_context(mock.patch.object(indexer, '_FEW', 1))

  @parameterized.parameters(0, 15, 16, 40, 63)
  def test_keys_beyond_the_last_visible_are_not_scored(self, last):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2, 64, 3)).astype(np.float32)

    def score(places, some):
      made = jnp.einsum('BCI->BC', some)[:, None] * jnp.ones((2, 5, 1))
      # A chunk too many would be the best.
      beyond = jnp.where(places < (last // 16 + 1) * 16, -jnp.inf, jnp.inf)
      return jnp.where(places <= last, made, beyond)

    got = lib.by_chunks(score, keys, (2, 5), jnp.int32(last), 4)
    want = np.where(np.arange(64) <= last, keys.sum(axis=-1), -np.inf)
    for row in range(5):
      np.testing.assert_array_equal(got[:, row], best(want, 4))

  @parameterized.product(
    length=(17, 32, 50, 96), k=(1, 3, 17), packed=(False, True), most=(4, 128)
  )
  def test_choices_are_those_of_all_scores_at_once(
    self, length, k, packed, most
  ):
    rng = np.random.default_rng(length)
    draw = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)
    query = IndexQuery(draw(2, length, 2, 3), draw(2, length, 2))
    keys, segments = draw(2, length, 3), None
    if packed:
      segments = np.sort(rng.integers(0, 4, (2, length)))[:, ::-1].copy()
      segments = jnp.asarray(segments, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(length), (2, length))
    args = query, keys, Visibility(places, segments), k
    how = {'key_segments': segments, 'most': most}
    got = jax.jit(lambda: choose(*args, **how))()
    with mock.patch.object(indexer, '_FEW', 1 << 30):
      want = jax.jit(lambda: choose(*args, **how))()
    np.testing.assert_array_equal(got, want)

  def test_a_cache_with_room_left_is_read_to_the_rows_own_places(self):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    query = IndexQuery(draw(2, 3, 2, 3), draw(2, 3, 2))
    keys = draw(2, 80, 3)
    keys[:, 40:] = np.nan  # never written
    places = jnp.asarray([[5, 6, 7], [30, 31, 32]])
    got = jax.jit(lambda: choose(query, keys, Visibility(places), 4))()
    with mock.patch.object(indexer, '_FEW', 1 << 30):
      keys[:, 40:] = 0
      want = jax.jit(lambda: choose(query, keys, Visibility(places), 4))()
    np.testing.assert_array_equal(got, want)

  def test_choosing_has_no_gradient(self):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, w, k = draw(1, 40, 2, 3), draw(1, 40, 2), draw(1, 40, 3)
    visibility = Visibility(jnp.arange(40)[None])

    def total(q, w, k):
      at = choose(IndexQuery(q, w), k, visibility, 3, most=8)
      return (k[0][jnp.maximum(at[0], 0)].sum(axis=-1) * at[0]).sum()

    dq, dw, dk = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, w, k)
    np.testing.assert_array_equal(dq, 0)
    np.testing.assert_array_equal(dw, 0)
    self.assertTrue(np.isfinite(dk).all())
    self.assertGreater(float(jnp.abs(dk).max()), 0)


if __name__ == '__main__':
  absltest.main()
