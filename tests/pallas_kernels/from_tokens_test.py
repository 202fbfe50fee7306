"""Tokens quantised while they are laid out give the product of their rows."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch, permute, target
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.from_tokens import product_of_tokens


def draw(dtype=jnp.bfloat16, dim=256):
  rng = np.random.default_rng(0)
  experts = rng.integers(0, 4, (9, 2))  # 3 is nowhere
  plan = permute.plan(jnp.asarray(experts), 3, block=32)
  x = jnp.asarray(rng.normal(size=(9, dim)), dtype)
  weights = jnp.asarray(rng.normal(size=(3, dim, 128)), dtype)
  grad = jnp.asarray(rng.normal(size=(plan.source.shape[0], 128)), dtype)
  return x, weights, plan, grad


def by_rows(x, weights, plan):
  rows = permute.permute(x, plan)
  layout = {'block_expert': plan.block_expert, 'used': plan.used}
  return grouped_matmul(rows, weights, **layout, float8=True)


class FromTokensTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_value_and_gradients_are_those_of_the_rows_to_the_bit(self, dtype):
    x, weights, plan, grad = draw(dtype)
    found = []
    for op in (product_of_tokens, by_rows):

      @jax.jit
      def both(x, weights, op=op):
        out, pull = jax.vjp(lambda *a: op(*a, plan), x, weights)
        return out, pull(grad)

      found.append(jax.tree.leaves(both(x, weights)))
    for a, b in zip(*found, strict=True):
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_array_equal(a, b)
    self.assertTrue(np.asarray(found[0][1], np.float32).any())

  def test_on_hopper_a_token_is_quantised_once_by_the_kernel(self):
    x, weights, plan, _ = draw(dim=512)
    with target.targeting('cuda', '9.0'), dispatch.recorded() as found:
      jax.eval_shape(lambda x, w: product_of_tokens(x, w, plan), x, weights)
    ops = {c.op: c.impl for c in found}
    self.assertEqual(ops['permute_fp8'], 'gpu')
    self.assertNotIn('permute', ops)

  def test_bad_widths_are_named(self):
    x, weights, plan, _ = draw()
    with self.assertRaisesRegex(ValueError, 'on the width: 128 and 256'):
      product_of_tokens(x[:, :128], weights, plan)
    with self.assertRaisesRegex(ValueError, 'width 100 is not a multiple'):
      product_of_tokens(x, weights[..., :100], plan)


if __name__ == '__main__':
  absltest.main()
