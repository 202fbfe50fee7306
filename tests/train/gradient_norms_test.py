"""Norms by block against float64 NumPy."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.train.gradient_norms import block_norms, gain, tree_norm
from tests import tiny


class TreeNormTest(parameterized.TestCase):
  def test_equals_float64_and_follows_every_scale(self):
    rng = np.random.default_rng(0)
    tree = {'a': rng.normal(size=(3, 5)), 'b': [rng.normal(), np.zeros(2)]}
    tree = jax.tree.map(np.float32, tree)
    flat = np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
    want = tree_norm(tree)
    np.testing.assert_allclose(
      want, np.linalg.norm(np.float64(flat)), rtol=1e-6
    )
    norm = jax.jit(tree_norm)
    for k in range(-116, 124, 6):
      s = np.float32(2.0) ** np.float32(k)
      got = norm(jax.tree.map(lambda a, s=s: a * s, tree))
      np.testing.assert_array_equal(got, want * s, err_msg=f'2^{k}')

  @parameterized.parameters(False, True)
  def test_arrays_of_all_sizes_count_alike(self, stacked):
    rng = np.random.default_rng(0)
    sizes = {'small': (2, 3), 'other': (2, 2, 2), 'large': (2, 1 << 14)}
    tree = {n: rng.normal(size=s).astype(np.float32) for n, s in sizes.items()}
    tree['other'] *= np.float32([1e30, 1e-30])[:, None, None]
    got = jax.jit(tree_norm, static_argnames='stacked')(tree, stacked=stacked)
    flat = [np.float64(a).reshape(2, -1) for a in tree.values()]
    axis = -1 if stacked else None
    want = np.linalg.norm(np.concatenate(flat, axis=-1), axis=axis)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    tree['large'][1] = np.nan
    np.testing.assert_array_equal(
      np.isnan(tree_norm(tree, stacked=stacked)),
      [False, True] if stacked else True,
    )

  @parameterized.parameters(
    ([[]], 0),
    ([[0.0, 0.0]], 0),
    ([[1e-40, 0.0]], 0),  # no normal number
    ([[2.0**-126], [1e-40]], 2.0**-126),
    ([[1e-30], [1.0]], 1),
    ([[3e38]], 3e38),
    ([[3e38], [3e38]], np.inf),  # beyond float32
    ([[np.inf], [1.0]], np.inf),
    ([[1.0, np.nan], [1.0]], np.nan),
    ([[np.inf], [np.nan]], np.nan),
  )
  def test_the_ends_of_float32(self, leaves, want):
    got = jax.jit(tree_norm)([np.float32(a) for a in leaves])
    np.testing.assert_allclose(got, want, rtol=1e-6)

  @parameterized.product(
    shape=((300,), (1 << 15,), (256, 256), (1, 1 << 15)),
    where=(slice(None), 0, -1),
  )
  def test_no_nan_is_lost_in_a_large_array(self, shape, where):
    a = np.zeros(shape, np.float32)
    a.reshape(-1)[where] = np.nan
    for tree in ({'a': a}, {'a': a, 'b': np.ones((1, 4), np.float32)}):
      self.assertTrue(np.isnan(jax.jit(tree_norm)(tree)))
    got = jax.jit(block_norms)(
      {'embed': a, 'segments': {0: {0: {'w': a[None]}}}}
    )
    self.assertTrue(np.isnan(got['embed']))
    self.assertTrue(np.isnan(got['segments.0.0']).all())

  def test_a_gain_is_a_power_of_two_with_a_normal_inverse(self):
    tops = np.float32([2.0**-126, 3e-20, 1.0, 1.9, 7e19, 3.4e38])
    found = np.asarray(jax.jit(gain)(tops))
    np.testing.assert_array_equal(np.frexp(found)[0], 0.5)
    self.assertTrue((tops * found >= 1).all() and (tops * found < 4).all())
    np.testing.assert_array_equal(gain(np.float32([0, 1e-40])), 0)


class BlockNormsTest(absltest.TestCase):
  def test_repeats_of_different_size_have_their_own_scale(self):
    w = np.float32([[3e-30, 4e-30], [3, 4], [3e30, 4e30], [0, 0]])
    got = block_norms({'segments': {0: {0: {'w': w, 'v': 0 * w}}}})
    np.testing.assert_allclose(
      got['segments.0.0'], [5e-30, 5, 5e30, 0], rtol=1e-6
    )

  def test_each_block_by_itself_and_all_together(self):
    tree = jax.tree.map(np.asarray, tiny.variables('step')['params'])
    got = jax.jit(block_norms)(tree)
    squares = lambda part: sum(
      np.square(np.float64(a)).sum() for a in jax.tree.leaves(part)
    )
    seen = 0.0
    for i, pattern in tree['segments'].items():
      for j, block in pattern.items():
        norms = got.pop(f'segments.{i}.{j}')
        self.assertLen(norms, jax.tree.leaves(block)[0].shape[0])
        for r, norm in enumerate(norms):
          layer = jax.tree.map(lambda a, r=r: a[r], block)
          np.testing.assert_allclose(norm**2, squares(layer), rtol=1e-5)
        seen += squares(block)
    for name, norm in got.items():
      top, _, k = name.partition('.')
      part = tree[top][int(k)] if k else tree[top]
      np.testing.assert_allclose(norm**2, squares(part), rtol=1e-5)
      seen += squares(part)
    np.testing.assert_allclose(seen, squares(tree), rtol=1e-12)

  def test_what_is_not_finite_stays_in_its_block(self):
    tree = {
      'embed': np.ones((2, 3), np.float32),
      'segments': {
        0: {0: {'w': np.array([[1.0, 2], [np.nan, 1], [np.inf, 0]])}}
      },
    }
    got = block_norms(tree)
    np.testing.assert_allclose(got['embed'], 6**0.5, rtol=1e-6)
    np.testing.assert_allclose(
      got['segments.0.0'], [5**0.5, np.nan, np.inf], rtol=1e-6
    )


if __name__ == '__main__':
  absltest.main()
