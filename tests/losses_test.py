"""The linear cross entropy against float64 and against jax's own gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.train.cross_entropy import (
  linear_cross_entropy,
  token_log_probs,
)

N, D, V = 42, 8, 32


@functools.cache
def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(N, D)), dtype)
  head = jnp.asarray(rng.normal(size=(D, V)), dtype)
  labels = jnp.asarray(rng.integers(0, V, N), jnp.int32)
  weights = rng.uniform(0, 2, N)
  weights[rng.permutation(N)[:10]] = 0
  return hidden, head, labels, jnp.asarray(weights, jnp.float32)


def wanted(hidden, head, labels, weights):
  """Value and gradients, token by token in float64."""
  hidden, head = np.asarray(hidden, float), np.asarray(head, float)
  total, dhidden, dhead = 0.0, np.zeros_like(hidden), np.zeros_like(head)
  for n, (h, label, w) in enumerate(zip(hidden, labels, np.float64(weights))):
    logits = h @ head
    p = np.exp(logits - logits.max())
    p /= p.sum()
    total -= w * np.log(p[label])
    p[label] -= 1
    dhidden[n] = w * head @ p
    dhead += w * np.outer(h, p)
  return total, dhidden, dhead


@functools.cache
def jitted(chunk):
  def scaled(hidden, head, labels, weights):
    return 3.0 * linear_cross_entropy(hidden, head, labels, weights, chunk)

  return jax.jit(scaled), jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))


class LinearCrossEntropyTest(parameterized.TestCase):
  # 21 divides 42; 20 does not (it takes 14); 41 leaves 21; 1 is the least.
  @parameterized.parameters(1024, 21, 20, 41, 1)
  def test_value_and_gradients_equal_float64(self, chunk):
    value, dhidden, dhead = wanted(*inputs())
    plain, both = jitted(chunk)
    got, (to_hidden, to_head) = both(*inputs())
    self.assertAlmostEqual(float(got) / (3 * value), 1, delta=1e-6)
    self.assertAlmostEqual(float(plain(*inputs())), float(got), delta=1e-3)
    np.testing.assert_allclose(to_hidden, 3 * dhidden, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(to_head, 3 * dhead, atol=5e-5, rtol=1e-5)

  def test_gradients_equal_autodiff_of_the_plain_formula(self):
    def plain(hidden, head, labels, weights):
      logits = jax.nn.log_softmax(hidden @ head)
      picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
      return -3.0 * (picked * weights).sum()

    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(*inputs())
    got = jitted(20)[1](*inputs())
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5)
    jax.tree.map(close, got, want)

  def test_tokens_of_weight_0_give_nothing(self):
    hidden, head, labels, weights = inputs()
    _, (to_hidden, _) = jitted(20)[1](hidden, head, labels, weights)
    unused = np.asarray(weights) == 0
    np.testing.assert_array_equal(to_hidden[unused], 0)
    self.assertGreater(float(jnp.abs(to_hidden[~unused]).min()), 0)

  def test_bfloat16_accumulates_in_float32(self):
    args = inputs(jnp.bfloat16)
    value, dhidden, dhead = wanted(*args)
    got, grads = jitted(20)[1](*args)
    self.assertEqual(got.dtype, jnp.float32)
    self.assertAlmostEqual(float(got) / (3 * value), 1, delta=1e-5)
    for a, b in zip(grads, (3 * dhidden, 3 * dhead)):
      self.assertEqual(a.dtype, jnp.bfloat16)
      # dlogits, the products and the scaling round to 8 bits each.
      error = np.abs(np.float64(a) - b).max() / np.abs(b).max()
      self.assertLess(error, 1e-2)

  def test_huge_logits_stay_finite(self):
    hidden, head, labels, weights = inputs()
    value, grads = jitted(21)[1](hidden * 1e4, head, labels, weights)
    self.assertTrue(np.isfinite(value))
    self.assertTrue(all(np.isfinite(g).all() for g in grads))

  @parameterized.parameters(7, 1024)
  def test_token_log_probs_equal_float64(self, chunk):
    hidden, head, labels, _ = inputs()
    shaped = hidden.reshape(2, N // 2, D)
    run = lambda h: token_log_probs(h, head, labels.reshape(2, -1), chunk)
    got = jax.jit(run)(shaped)
    for n in range(N):
      one = jnp.zeros(N).at[n].set(1)
      want = -wanted(hidden, head, labels, one)[0]
      self.assertAlmostEqual(float(got.reshape(-1)[n]), want, delta=1e-5)
    grad = jax.jit(jax.grad(lambda h: run(h).sum()))(shaped).reshape(N, D)
    want = -wanted(hidden, head, labels, jnp.ones(N))[1]
    np.testing.assert_allclose(grad, want, atol=1e-5, rtol=1e-5)


if __name__ == '__main__':
  absltest.main()
