"""The linear cross entropy against float64 and against jax's own gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.train.cross_entropy import (
  IGNORED,
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


def scans(jaxpr):
  """The lengths of all loops in a jaxpr."""
  out = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'scan':
      out.append(eqn.params['length'])
      continue
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      out += scans(inner) if hasattr(inner, 'eqns') else []
  return out


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

  # Prime, twice a prime, one more than a chunk, many chunks; none at all.
  @parameterized.parameters((13, 5), (26, 8), (9, 8), (37, 4), (2, 1), (0, 4))
  def test_any_number_of_tokens(self, count, chunk):
    hidden, _, labels, weights = inputs()
    args = hidden[:count], inputs()[1], labels[:count], weights[:count]
    value, dhidden, dhead = wanted(*args)
    got, (to_hidden, to_head) = jitted(chunk)[1](*args)
    self.assertAlmostEqual(float(got), 3 * value, delta=1e-4)
    np.testing.assert_allclose(to_hidden, 3 * dhidden, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(to_head, 3 * dhead, atol=5e-5, rtol=1e-5)
    said = token_log_probs(*args[:3], chunk)
    self.assertEqual(said.shape, (count,))
    self.assertAlmostEqual(float(-(said * args[3]).sum()), value, delta=1e-4)

  @parameterized.parameters(
    (8191, 1024, 8),
    (8192, 1024, 8),
    (8186, 1024, 8),
    (6143, 1000, 7),
    (5, 9, 1),
  )
  def test_chunks_are_as_few_as_fit(self, count, chunk, steps):
    """Each adds a gradient of the whole head."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    args = shape(count, D), shape(D, V), shape(count, dtype=jnp.int32)
    weights = shape(count)
    run = lambda *a: linear_cross_entropy(*a, chunk)
    for f, more in (
      (run, (weights,)),
      (jax.grad(run, argnums=(0, 1)), (weights,)),
      (lambda *a: token_log_probs(*a, chunk), ()),
    ):
      self.assertEqual(scans(jax.make_jaxpr(f)(*args, *more).jaxpr), [steps])

  @parameterized.parameters(-1, V, -100, 2**30)
  def test_a_label_outside_the_vocabulary_is_named_or_nan(self, wrong):
    hidden, head, labels, _ = inputs()
    weights, labels = jnp.ones(N), labels.at[5].set(wrong)
    with self.assertRaisesRegex(InputError, f'^labels: {wrong} is outside'):
      linear_cross_entropy(hidden, head, labels, weights)
    plain, both = jitted(20)
    value, (to_hidden, to_head) = both(hidden, head, labels, weights)
    self.assertTrue(np.isnan(plain(hidden, head, labels, weights)))
    self.assertTrue(np.isnan(value))
    self.assertTrue(np.isnan(to_hidden[5]).all())
    self.assertTrue(np.isnan(to_head).any())
    # Without a weight it may be anything.
    unused = weights.at[5].set(0)
    want = both(hidden, head, labels.at[5].set(0), unused)
    got = both(hidden, head, labels, unused)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    linear_cross_entropy(hidden, head, labels, unused)

  def test_the_log_prob_of_an_ignored_label_is_0(self):
    hidden, head, labels, _ = inputs()
    ignored = labels.at[5].set(IGNORED)
    said = token_log_probs(hidden, head, ignored, 20)
    self.assertEqual(float(said[5]), 0)
    plain = token_log_probs(hidden, head, labels, 20)
    np.testing.assert_array_equal(np.delete(said, 5), np.delete(plain, 5))
    run = jax.jit(
      jax.grad(
        lambda h, l: (token_log_probs(h, head, l, 20) * jnp.arange(N)).sum()
      )
    )
    grad, other = run(hidden, ignored), run(hidden, labels)
    np.testing.assert_array_equal(grad[5], 0)
    np.testing.assert_array_equal(np.delete(grad, 5, 0), np.delete(other, 5, 0))

  @parameterized.parameters(-1, V, -99)
  def test_the_log_prob_of_another_is_named_or_nan(self, wrong):
    hidden, head, labels, _ = inputs()
    labels = labels.at[5].set(wrong)
    with self.assertRaisesRegex(InputError, f'^labels: {wrong} is outside'):
      token_log_probs(hidden, head, labels)
    said = jax.jit(token_log_probs)(hidden, head, labels)
    np.testing.assert_array_equal(np.isnan(said), np.arange(N) == 5)
    grad = jax.jit(jax.grad(lambda h, l: token_log_probs(h, head, l).sum()))
    self.assertTrue(np.isnan(grad(hidden, labels)[5]).all())

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

  def test_a_head_of_many_chunks_gets_all_of_its_gradient(self):
    """In bfloat16 a sum of 2,048 equal numbers would stand still at 256."""
    hidden = jnp.ones((2048, 2), jnp.bfloat16)
    labels = jnp.zeros(2048, jnp.int32)
    total = lambda head: token_log_probs(hidden, head, labels, 1).sum()
    grad = jax.jit(jax.grad(total))(jnp.zeros((2, 4), jnp.bfloat16))
    # A label's probability is 1/4: 3/4 of a logit each, -1/4 of the others.
    self.assertEqual(grad.tolist(), [[1536, -512, -512, -512]] * 2)


if __name__ == '__main__':
  absltest.main()
