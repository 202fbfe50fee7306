"""router against a loop over tokens and experts in float64."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch
from pallas_kernels.router import Rule, reference, router
from pallas_kernels.router.shapes import TEST


def draw(shape):
  """Logits in quarters, so that many scores tie."""
  rng = np.random.default_rng(0)
  logits = np.round(rng.normal(size=(shape.tokens, shape.experts)) * 8) / 4
  bias = rng.integers(-2, 3, shape.experts) / 2
  return logits.astype(np.float32), bias if shape.bias else None


def scores_of(x, scoring):
  if scoring == 'softmax':
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  if scoring == 'sigmoid':
    return 1 / (1 + np.exp(-x))
  return np.sqrt(np.log1p(np.exp(x)))


def best(values, count):
  """Indices of the largest values; among equals the lower index."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route_token(x, bias, top_k, rule):
  scores = scores_of(x.astype(np.float64), rule.scoring)
  choice = scores + (0 if bias is None else bias)
  size = len(x) // rule.groups
  groups = choice.reshape(rule.groups, size)
  count = 1 if rule.group_score == 'max' else 2
  rank = [sum(sorted(g)[-count:]) for g in groups]
  allowed = range(rule.groups)
  if rule.groups > 1:
    allowed = best(rank, rule.top_groups)
  masked = [
    c if e // size in allowed else -np.inf for e, c in enumerate(choice)
  ]
  experts = best(masked, top_k)
  weights = scores[experts]
  if rule.normalize:
    weights = weights / (weights.sum() + 1e-20)
  return experts, weights * rule.scale


class RouterTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_reference_equals_a_loop_in_float64(self, shape):
    logits, bias = draw(shape)
    # The same scores in both, so that ties are ties in both.
    experts, weights, counts = router(
      logits, bias, top_k=shape.top_k, rule=shape.rule, impl='reference'
    )
    chosen = np.zeros(shape.experts, int)
    for n, x in enumerate(logits):
      want, gains = route_token(x, bias, shape.top_k, shape.rule)
      np.testing.assert_array_equal(experts[n], want)
      np.testing.assert_allclose(weights[n], gains, rtol=2e-6)
      chosen[want] += 1
    np.testing.assert_array_equal(counts, chosen)

  def test_bias_moves_the_choice_and_not_the_weight(self):
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    rule = Rule('sigmoid', normalize=False)
    bias = jnp.asarray([-9.0, 0.0, 0.0, 9.0])
    experts, weights, _ = router(logits, bias, top_k=2, rule=rule)
    np.testing.assert_array_equal(experts, [[3, 1]])
    np.testing.assert_allclose(
      weights, jax.nn.sigmoid(jnp.asarray([[-1.0, 1.0]])), rtol=1e-6
    )

  def test_negative_biased_scores_beat_excluded_groups(self):
    # All allowed scores are negative: a mask of 0 would choose others.
    logits = jnp.asarray([[1.0, 1.0, 0.0, 0.0]])
    rule = Rule('sigmoid', groups=2, top_groups=1)
    experts, *_ = router(logits, -5 * jnp.ones(4), top_k=2, rule=rule)
    np.testing.assert_array_equal(experts, [[0, 1]])

  @parameterized.named_parameters(TEST.items())
  def test_gradient_equals_that_of_the_chosen_weights(self, shape):
    logits, bias = draw(shape)
    experts, *_ = router(logits, bias, top_k=shape.top_k, rule=shape.rule)
    pull = np.cos(np.arange(experts.size)).reshape(experts.shape)

    def through(x):
      out = router(x, bias, top_k=shape.top_k, rule=shape.rule)[1]
      return (out * pull).sum()

    step = 1e-3
    grad = jax.jit(jax.grad(through))(jnp.asarray(logits))
    rng = np.random.default_rng(1)
    way = rng.normal(size=logits.shape)

    def along(t):
      total = 0.0
      for n, x in enumerate(logits.astype(np.float64) + t * way):
        scores = scores_of(x, shape.rule.scoring)[np.asarray(experts[n])]
        if shape.rule.normalize:
          scores = scores / scores.sum()
        total += shape.rule.scale * (scores * pull[n]).sum()
      return total

    slope = (along(step) - along(-step)) / (2 * step)
    np.testing.assert_allclose((grad * way).sum(), slope, rtol=1e-4, atol=1e-5)

  def test_very_negative_logits_keep_their_scores(self):
    scores = reference.score(jnp.asarray([[-40.0, -20.0]]), 'sqrtsoftplus')
    np.testing.assert_allclose(scores, [[np.exp(-20), np.exp(-10)]], rtol=1e-5)

  @parameterized.parameters(
    ({'scoring': 'tanh'}, "scoring='tanh'"),
    ({'groups': 3}, 'groups=3'),
    ({'groups': 4, 'top_groups': 5}, 'top_groups=5'),
    ({'groups': 8, 'top_groups': 4}, "group_score='top2' needs groups of 2"),
    ({'groups': 4, 'top_groups': 1}, r'top_k=4 is outside 1\.\.2'),
  )
  def test_bad_rules_name_the_field(self, change, message):
    rule = dataclasses.replace(Rule(), **change)
    with self.assertRaisesRegex(ValueError, message):
      router(jnp.zeros((2, 8)), top_k=4, rule=rule)

  def test_unsupported_kernel_shape_says_why(self):
    for experts, top_k, groups, reason in (
      (260, 4, 1, '260 experts'),
      (520, 4, 1, '520 experts, more than 512'),
      (512, 256, 1, '256 of 512 experts need [0-9]+ bytes of shared memory'),
      (256, 4, 32, '32 groups'),
      (424, 4, 8, '4 of 424 experts need [0-9]+ bytes of shared memory'),
    ):
      logits = jnp.zeros((2, experts))
      rule = Rule(groups=groups)
      with self.assertRaisesRegex(NotImplementedError, reason):
        router(logits, top_k=top_k, rule=rule, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'bfloat16'):
      logits = jnp.zeros((2, 8), jnp.bfloat16)
      router(logits, top_k=4, rule=Rule(), impl='gpu')

  def test_too_little_shared_memory_falls_back_while_tracing(self):
    op = functools.partial(router, top_k=256, rule=Rule())
    logits = jax.ShapeDtypeStruct((2, 512), jnp.float32)
    with mock.patch.object(dispatch, 'on_hopper', lambda: True):
      experts, *_ = jax.eval_shape(op, logits)
    self.assertEqual(experts.shape, (2, 256))


if __name__ == '__main__':
  absltest.main()
