"""sparse_gqa against loops over queries, groups and heads in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.sparse_gqa import gpu, sparse_gqa
from pallas_kernels.sparse_gqa.shapes import TEST
from pallas_kernels.sparse_mla import gpu as latent
from pallas_kernels.sparse_mla import reference as latent_reference

SCALE = 0.4


def draw(shape, seed=0):
  """q, k, v in float64, and choices."""
  rng = np.random.default_rng(seed)
  B, T, S, G, J, M, nothing, K, V = shape
  normal = lambda *size: rng.normal(size=size)
  index = rng.integers(0, S, (B, T, G, M))
  index = np.where(rng.random(index.shape) < nothing, -1, index)
  floats = normal(B, T, G, J, K), normal(B, S, G, K), normal(B, S, G, V)
  return *floats, index.astype(np.int32)


def loop(q, k, v, index):
  out = np.zeros((*q.shape[:-1], v.shape[-1]))
  for b, t, g, j in np.ndindex(q.shape[:4]):
    at = [i for i in index[b, t, g] if i >= 0]
    if at:
      scores = SCALE * k[b, at, g] @ q[b, t, g, j]
      weights = np.exp(scores - scores.max())
      out[b, t, g, j] = weights @ v[b, at, g] / weights.sum()
  return out


class SparseGqaTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_value_and_gradient_equal_a_loop_in_float64(self, shape):
    *floats, index = draw(shape)
    narrow = [a.astype(np.float32) for a in floats]
    op = functools.partial(sparse_gqa, scale=SCALE, impl='reference')
    got, pull = jax.vjp(lambda *a: op(*a, index), *narrow)
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

  @parameterized.parameters((6, 4, 8, 0), (6, 4, 8, 2), (6, 6, 10, 2))
  def test_keys_and_values_side_by_side_give_the_same(self, K, V, width, rope):
    shape = TEST['plain']._replace(keys=K, values=V)
    *floats, index = draw(shape)
    bf = [jnp.asarray(a, jnp.bfloat16) for a in floats]
    packing = gpu.Packing(K + V - rope + 3, rope)
    # The kernel's own preparation, with the reference in the kernel's place.
    with (
      absltest.mock.patch.multiple(
        gpu,
        ROPE=rope,
        packing_of=lambda *_: packing,
      ),
      absltest.mock.patch.object(
        latent, 'sparse_mla', latent_reference.sparse_mla
      ),
    ):
      op = lambda *a: gpu.sparse_gqa(*a, jnp.asarray(index), SCALE)
      got, pull = jax.vjp(op, *bf)
    want, want_pull = jax.vjp(
      lambda *a: sparse_gqa(*a, index, scale=SCALE, impl='reference'), *bf
    )
    grad = jnp.ones_like(got)
    for a, b in zip((got, *pull(grad)), (want, *want_pull(grad))):
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      np.testing.assert_allclose(a, b, rtol=2**-6, atol=2**-6)

  @parameterized.parameters(
    (192, 128, (256, 64)),
    (128, 128, (256, 0)),
    (64, 64, (256, 0)),
    (256, 256, (512, 0)),
    (320, 256, (512, 64)),
  )
  def test_the_narrowest_row_is_taken(self, keys, values, want):
    self.assertEqual(gpu.packing_of(keys, values), want)

  def test_what_the_kernel_cannot_take_says_why(self):
    *floats, index = draw(TEST['plain']._replace(keys=400, values=200))
    bf = [jnp.asarray(a, jnp.bfloat16) for a in floats]
    with self.assertRaisesRegex(NotImplementedError, 'not 576 together'):
      sparse_gqa(*bf, index, scale=1.0, impl='gpu')
    *floats, index = draw(TEST['plain'])
    with self.assertRaisesRegex(NotImplementedError, 'not bfloat16'):
      sparse_gqa(*floats, index, scale=1.0, impl='gpu')

  def test_rows_that_are_none_do_not_count_even_if_nan(self):
    q, k, v, index = draw(TEST['plain'])
    want = sparse_gqa(q, k, v, np.where(index == 0, -1, index), scale=SCALE)
    k[:, 0], v[:, 0] = np.nan, np.nan
    S = k.shape[1]
    for none in (-1, -7, S, 2**31 - 1):
      got = sparse_gqa(q, k, v, np.where(index == 0, none, index), scale=SCALE)
      np.testing.assert_array_equal(got, want)

  def test_bad_input_names_the_field(self):
    q, k, v, index = draw(TEST['plain'])
    with self.assertRaisesRegex(ValueError, r'v is \[2, 8, 2, 4\], but'):
      sparse_gqa(q, k, v[:, 1:], index, scale=1.0)
    with self.assertRaisesRegex(ValueError, 'index is float64'):
      sparse_gqa(q, k, v, index.astype(float), scale=1.0)


if __name__ == '__main__':
  absltest.main()
