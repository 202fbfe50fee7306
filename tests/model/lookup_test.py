"""The gradient of a row that is used often is exact whatever the dtype."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model import lookup
from deepseek_jax.model.attention import query_blocks
from deepseek_jax.model.attention.dsa_reading import read_chosen
from tests import tiny


class LookupTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_a_row_used_4096_times_gets_all_of_its_gradient(self, dtype):
    index = jnp.full(4096, 3).at[:5].set(jnp.arange(5))
    total = lambda t: lookup.rows(t, index).astype(jnp.float32).sum()
    grad = jax.grad(total)(jnp.zeros((8, 2), dtype))
    self.assertEqual(grad.dtype, dtype)
    want = np.bincount(index, minlength=8)[:, None] * np.ones(2)
    # 4092 has 12 bits, of which bfloat16 keeps 8.
    np.testing.assert_allclose(np.float64(grad), want, rtol=2.0**-8)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_a_latent_that_all_queries_chose_gets_all_of_its_gradient(
    self, dtype
  ):
    chosen = jnp.zeros((1, 2048, 2), jnp.int32).at[:, :, 1].set(-1)
    total = lambda k: query_blocks.rows(k, chosen).astype(jnp.float32).sum()
    grad = jax.grad(total)(jnp.zeros((1, 4, 2), dtype))
    self.assertEqual(float(grad[0, 0, 0]), 4096)  # -1 reads some row: this one

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_a_latent_of_many_blocks_gets_all_of_its_gradient(self, dtype):
    """2,048 blocks of a query each, which all choose the same latent."""
    T, one = 2048, lambda *shape: jnp.ones(shape, dtype)
    chosen = jnp.zeros((1, T, 1), jnp.int32)
    queries = one(1, T, 1, 2), one(1, T, 1, 2)

    def total(queries, keys, ups):
      read = read_chosen(queries, keys, ups, chosen, scale=1.0, most=1)
      return read.y.astype(jnp.float32).sum()

    keys, ups = (one(1, 4, 2), one(1, 4, 2)), (one(2, 1, 2), one(2, 1, 2))
    dq, (dc, _), (_, dv) = jax.grad(total, (0, 1, 2))(queries, keys, ups)
    self.assertEqual(dc.dtype, dtype)
    # A latent gives each of T queries 2 numbers; v_up mixes a latent of ones.
    self.assertEqual(dc[0, 0].tolist(), [2 * T, 2 * T])
    self.assertEqual(dv[:, 0].tolist(), [[T, T], [T, T]])
    self.assertEqual(dq[0].shape, (1, T, 1, 2))

  def test_sums_in_float32_take_little_more_memory(self):
    T, C, H, K = 512, 64, 4, 32
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    queries = shape(1, T, H, 4), shape(1, T, H, 2)
    keys, up = (shape(1, T, C), shape(1, T, 2)), shape(C, H, 4)
    chosen = jax.ShapeDtypeStruct((1, T, K), jnp.int32)

    def scratch():
      def total(queries, keys, ups, chosen):
        read = read_chosen(queries, keys, ups, chosen, scale=1.0, most=32)
        return read.y.astype(jnp.float32).sum()

      gradient = jax.jit(jax.grad(total, (0, 1, 2)))
      done = gradient.lower(queries, keys, (up, up), chosen).compile()
      return done.memory_analysis().temp_size_in_bytes

    def narrow(f, blocks, shared):
      one = jax.checkpoint(lambda block: f(block, *shared))
      return jax.lax.map(one, blocks)

    with mock.patch.object(query_blocks, 'each', narrow):
      least = scratch()
    # Two more bytes per number of the keys; it is 1.2 here.
    self.assertLess(scratch(), 1.4 * least)

  @parameterized.parameters(1, 2, 5)
  def test_blocks_change_no_gradient_beyond_rounding(self, most):
    """Shared arrays, a number and None; queries of either kind."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    at = jnp.asarray(rng.integers(0, 6, (2, 10, 3)), jnp.int32)
    shared = draw(2, 6, 4), (jnp.arange(6), None, 3)
    way = rng.normal(size=(2, 10))

    def f(block, keys, other):
      x, at = block
      wide = lambda a: a.astype(jnp.float32)
      read = wide(query_blocks.rows(keys, at)) * wide(x[:, :, None])
      number = query_blocks.rows(other[0][None].repeat(2, 0), at)
      return other[2] * read.sum((-1, -2)), number

    def total(x, shared, most):
      value, number = query_blocks.over_blocks(f, (x, at), most, shared=shared)
      self.assertEqual(number.shape, at.shape)
      return (value * way).sum()

    def gradient(x, keys, most):
      of = lambda x, keys: total(x, (keys, shared[1]), most)
      return jax.jit(jax.grad(of, (0, 1)))(x, keys)

    x = draw(2, 10, 4)
    got = gradient(x, shared[0], most)
    want = gradient(x.astype(jnp.float32), shared[0].astype(jnp.float32), 10)
    for a, b in zip(got, want):
      self.assertEqual(a.dtype, jnp.bfloat16)
      # Rounded terms of both signs, up to twice as great as their sum.
      self.assertLess(tiny.relative(np.float64(a), b), 2.0**-7)

  def test_a_frequent_token_trains_in_bfloat16_as_in_float32(self):
    tokens = np.random.default_rng(0).integers(1, 64, (8, 256))
    tokens[np.random.default_rng(1).random(tokens.shape) < 0.6] = 7
    grads = {}
    for dtype in ('float32', 'bfloat16'):
      changes = {'compute.dtype': dtype}
      model = ds.build(ds.changed(tiny.config('llama'), changes))
      variables = tiny.variables('llama')

      def loss(embed, model=model, variables=variables):
        params = variables['params'] | {'embed': embed}
        out = model.apply(variables | {'params': params}, tokens[:, :-1])
        picked = jax.nn.log_softmax(out.logits)
        return -jnp.take_along_axis(picked, tokens[:, 1:, None], -1).mean()

      grads[dtype] = jax.jit(jax.grad(loss))(variables['params']['embed'])
    error = np.linalg.norm(grads['bfloat16'] - grads['float32'], axis=1)
    error /= np.linalg.norm(grads['float32'], axis=1) + 1e-30
    # As good as a token that is seldom; it was off by 0.18.
    self.assertLess(error[7], 0.05)


if __name__ == '__main__':
  absltest.main()
