"""sparse_mla against loops over queries and heads in float64."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.sparse_mla import latent_gradient, sparse_mla
from pallas_kernels.sparse_mla.shapes import TEST

C, R, SCALE = 12, 4, 0.4


def draw(shape, seed=0):
  """q_c, q_r, c, k_r in float64, and choices without repetition."""
  rng = np.random.default_rng(seed)
  B, T, S = shape.batch, shape.queries, shape.keys
  normal = lambda *size: rng.normal(size=size)
  index = np.stack(
    [np.sort(rng.permutation(S)[: shape.top_k]) for _ in range(B * T)]
  ).reshape(B, T, -1)
  index = np.where(rng.random(index.shape) < shape.nothing, -1, index)
  H = shape.heads
  arrays = normal(B, T, H, C), normal(B, T, H, R), normal(B, S, C)
  return *arrays, normal(B, S, R), index.astype(np.int32)


def loop(q_c, q_r, c, k_r, index):
  out = np.zeros(q_c.shape)
  for b, t, h in np.ndindex(q_c.shape[:3]):
    at = [i for i in index[b, t] if i >= 0]
    if not at:
      continue
    scores = SCALE * (c[b, at] @ q_c[b, t, h] + k_r[b, at] @ q_r[b, t, h])
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ c[b, at] / weights.sum()
  return out


jitted = jax.jit(functools.partial(sparse_mla, scale=SCALE, impl='reference'))


class SparseMlaTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_value_and_gradient_equal_a_loop_in_float64(self, shape):
    *floats, index = draw(shape)
    narrow = [a.astype(np.float32) for a in floats]
    got, pull = jax.vjp(lambda *a: jitted(*a, index), *narrow)
    np.testing.assert_allclose(got, loop(*floats, index), rtol=2e-5, atol=2e-5)
    weight = np.cos(np.arange(got.size)).reshape(got.shape)
    grads = pull(jnp.asarray(weight, jnp.float32))
    rng = np.random.default_rng(1)
    ways = [rng.normal(size=a.shape) for a in floats]
    ahead, behind = (
      loop(*(a + step * way for a, way in zip(floats, ways)), index)
      for step in (1e-5, -1e-5)
    )
    slope = ((ahead - behind) * weight).sum() / 2e-5
    along = sum((g * way).sum() for g, way in zip(grads, ways))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)

  def test_a_latent_that_all_queries_chose_gets_all_of_its_gradient(self):
    one = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    queries = one(1, 2048, 1, C), one(1, 2048, 1, R)
    index = jnp.zeros((1, 2048, 1), jnp.int32)
    total = lambda c: jitted(*queries, c, one(1, 4, R), index).sum()
    grad = jax.grad(total)(one(1, 4, C))
    self.assertEqual(grad.dtype, jnp.bfloat16)
    self.assertEqual(grad[0, 0].tolist(), [2048] * C)  # it was 256

  @parameterized.parameters(3, 0)  # what stands in for no choice may be 0
  def test_latents_that_are_not_chosen_do_not_count_even_if_nan(self, at):
    q_c, q_r, c, k_r, index = draw(TEST['some_none'])
    index[index == at] = -1
    want = jitted(q_c, q_r, c, k_r, index)
    c[:, at], k_r[:, at] = np.nan, np.nan
    np.testing.assert_array_equal(jitted(q_c, q_r, c, k_r, index), want)

  def test_no_array_of_queries_by_keys_is_made(self):
    T, S, K, H = 512, 640, 64, 2
    shapes = [(1, T, H, 64), (1, T, H, 8), (1, S, 64), (1, S, 8)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    index = jax.ShapeDtypeStruct((1, T, K), jnp.int32)

    def loss(*args):
      return sparse_mla(*args, scale=1.0, impl='reference').sum()

    text = jax.jit(jax.grad(loss, (0, 2))).lower(*args, index).as_text()
    shapes = re.findall(r'tensor<([0-9x]+)x[a-z]', text)
    sizes = [set(map(int, shape.split('x'))) for shape in shapes]
    self.assertTrue(any({T, K} <= size for size in sizes))
    self.assertFalse([size for size in sizes if {T, S} <= size])

  def test_parts_of_a_latent_are_listed_in_order_of_the_queries(self):
    at = jnp.asarray([[2, 0, -1], [0, 2, 2], [-1, 2, 1]]).reshape(-1)
    order, starts = latent_gradient._lists(at, 4)
    lists = [list(order[a:b]) for a, b in itertools.pairwise(starts)]
    self.assertEqual(lists, [[1, 3], [8], [0, 4, 5, 7], []])

  def test_unsupported_kernel_shape_says_why(self):
    *floats, index = draw(TEST['plain'])
    narrow = [jnp.asarray(a, jnp.float32) for a in floats]
    with self.assertRaisesRegex(NotImplementedError, 'dtype float32'):
      sparse_mla(*narrow, index, scale=1.0, impl='gpu')
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in floats]
    with self.assertRaisesRegex(NotImplementedError, 'latent 12 and rope 4'):
      sparse_mla(*narrow, index, scale=1.0, impl='gpu')

  def test_bad_input_names_the_field(self):
    *floats, index = draw(TEST['plain'])
    with self.assertRaisesRegex(ValueError, r'index is \[2, 4, 6\], but'):
      sparse_mla(*floats, index[:, 1:], scale=1.0)
    with self.assertRaisesRegex(ValueError, 'index is float32'):
      sparse_mla(*floats, index.astype(np.float32), scale=1.0)


if __name__ == '__main__':
  absltest.main()
