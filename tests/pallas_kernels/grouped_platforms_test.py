"""The products that other platforms get, against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.grouped_matmul import (
  accelerators,
  grouped_matmul,
  reference,
)

FORWARD = {
  'runs': reference.by_runs,
  'blocks': accelerators.by_blocks,
  'ragged': accelerators.ragged,
}
OUTER = {
  'runs': reference.outer_by_runs,
  'blocks': accelerators.outer_by_blocks,
}
# Experts of blocks of four rows; sorted, not sorted, with absent ones.
LAYOUTS = (([0, 0, 1, 3, 3, 3], 6), ([2, 2, 0, 1, 1, 3], 5), ([1], 1))


def draw(experts, used):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(4 * len(experts), 6))
  rows[4 * used :] = 0
  grads = rng.normal(size=(len(rows), 5))
  return rows, rng.normal(size=(4, 6, 5)), grads


class GroupedPlatformsTest(parameterized.TestCase):
  @parameterized.product(
    name=sorted(FORWARD), layout=LAYOUTS, transpose=(False, True)
  )
  def test_products_are_those_of_a_loop(self, name, layout, transpose):
    experts, used = layout
    rows, weights, _ = draw(experts, used)
    want = np.concatenate(
      [rows[4 * i : 4 * i + 4] @ weights[e] for i, e in enumerate(experts)]
    )
    given = weights.swapaxes(1, 2) if transpose else weights
    args = [jnp.asarray(a, jnp.float32) for a in (rows, given)]
    fn = jax.jit(FORWARD[name], static_argnames='transpose')
    args += [jnp.asarray(experts), jnp.int32(used)]
    got = fn(*args, transpose=transpose)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # What is not used stays zero, whatever the last expert's weights are.
    args[1] = args[1].at[experts[-1]].set(jnp.nan)
    got = fn(*args, transpose=transpose)
    self.assertFalse(got[4 * used :].any())

  @parameterized.product(name=sorted(OUTER), layout=LAYOUTS)
  def test_sums_of_experts_are_those_of_a_loop(self, name, layout):
    experts, used = layout
    rows, weights, grads = draw(experts, used)
    want = np.zeros(weights.shape)
    for i, e in enumerate(experts[:used]):
      want[e] += rows[4 * i : 4 * i + 4].T @ grads[4 * i : 4 * i + 4]
    args = [jnp.asarray(a, jnp.float32) for a in (rows, grads)]
    fn = jax.jit(OUTER[name], static_argnames='num_experts')
    got = fn(*args, jnp.asarray(experts), jnp.int32(used), num_experts=4)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(
    ('cpu', True, False), ('cuda', False, False), ('tpu', False, True)
  )
  def test_the_platform_it_is_lowered_for_decides(self, platform, runs, ragged):
    def step(rows, weights):
      fn = lambda *a: grouped_matmul(*a, jnp.arange(32) // 8)
      out, pull = jax.vjp(fn, rows, weights)
      return pull(out)

    args = jnp.zeros((128, 16)), jnp.zeros((4, 16, 8))
    traced = jax.jit(step).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Loops over runs and over chunks of each; else one each of blocks.
    self.assertEqual(text.count('stablehlo.while') == 6, runs)
    self.assertEqual('ragged_dot' in text, ragged)


if __name__ == '__main__':
  absltest.main()
