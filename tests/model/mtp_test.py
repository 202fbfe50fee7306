import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.context import Context
from deepseek_jax.model.mtp import MTPConfig, shifted


class ShiftedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tokens = jnp.array([[5, 6, 7, 8, 9, 4], [3, 2, 1, 5, 6, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2], [7, 7, 7, 7, 7, 0]])
    self.ctx = Context(tokens, positions, segments)

  def test_the_token_ahead_takes_the_place_within_its_document(self):
    one = shifted(self.ctx, 1)
    kept = np.array([[1, 1, 0, 2, 2, 0], [7, 7, 7, 7, 0, 0]])
    np.testing.assert_array_equal(one.segments, kept)
    np.testing.assert_array_equal(
      np.where(kept > 0, one.tokens, -1),
      [[6, 7, -1, 9, 4, -1], [2, 1, 5, 6, -1, -1]],
    )
    np.testing.assert_array_equal(one.positions, self.ctx.positions)

  def test_two_ahead(self):
    two = shifted(self.ctx, 2)
    kept = np.array([[1, 0, 0, 2, 0, 0], [7, 7, 7, 0, 0, 0]])
    np.testing.assert_array_equal(two.segments, kept)
    np.testing.assert_array_equal(
      np.where(kept > 0, two.tokens, -1),
      [[7, -1, -1, 4, -1, -1], [1, 5, 6, -1, -1, -1]],
    )

  def test_without_documents_only_the_end_is_cut(self):
    one = shifted(self.ctx._replace(segments=None), 2)
    np.testing.assert_array_equal(one.segments, [[1, 1, 1, 1, 0, 0]] * 2)

  def test_a_negative_depth_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, r'mtp\.depth = -1'):
      MTPConfig(depth=-1)


if __name__ == '__main__':
  absltest.main()
