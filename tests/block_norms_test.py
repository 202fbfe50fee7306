"""Norms by block against float64 NumPy."""

import jax
import numpy as np
from absl.testing import absltest

from deepseek_jax.train.gradient_norms import block_norms
from tests import tiny


class BlockNormsTest(absltest.TestCase):
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
