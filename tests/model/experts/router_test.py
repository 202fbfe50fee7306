"""Routing by hand-worked examples and against a loop in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts import router as lib
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import Router, RouterConfig
from pallas_kernels import router as kernel
from tests import reference, tiny

GREEDY = RouterConfig(scoring='softmax', bias=False, normalize=False)
V2 = dataclasses.replace(
  GREEDY, groups=4, top_groups=2, group_score='max', scale=16.0
)
V3 = RouterConfig(groups=4, top_groups=2, scale=2.5)


def choose(scores, cfg, top_k, bias=None):
  if bias is not None:
    bias = jnp.asarray(bias, jnp.float32)
  experts, weights = lib.choose(
    jnp.asarray(scores, jnp.float32), bias, top_k, cfg
  )
  return experts.tolist(), weights


class ByHandTest(parameterized.TestCase):
  def test_greedy_takes_the_best_and_keeps_their_probabilities(self):
    experts, weights = choose([0.1, 0.4, 0.2, 0.3], GREEDY, 2)
    self.assertEqual(experts, [1, 3])
    np.testing.assert_allclose(weights, [0.4, 0.3], rtol=1e-6)

  def test_v2_ranks_groups_by_their_best_expert_and_times_16(self):
    # Groups (0 1) (2 3) (4 5) (6 7), best .30 .16 .14 .13: the first two stay,
    # so 4 and 6 lose to 3 and 1 although they score higher.
    s = [0.30, 0.02, 0.16, 0.05, 0.14, 0.13, 0.13, 0.07]
    experts, weights = choose(s, V2, 4)
    self.assertEqual(experts, [0, 2, 3, 1])
    np.testing.assert_allclose(
      weights, np.array([0.30, 0.16, 0.05, 0.02]) * 16, rtol=1e-6
    )

  def test_v3_ranks_groups_by_their_best_two(self):
    # Sums of two: .9+.0, .5+.5, .6+.2, .1+.1. The best single expert, 0, is in
    # the second of the groups kept; 4 would beat 2 by itself but its group
    # loses.
    s = [0.9, 0.0, 0.5, 0.5, 0.6, 0.2, 0.1, 0.1]
    experts, weights = choose(s, V3, 3)
    self.assertEqual(experts, [0, 2, 3])
    np.testing.assert_allclose(
      weights, np.array([0.9, 0.5, 0.5]) / 1.9 * 2.5, rtol=1e-6
    )

  def test_the_bias_moves_the_choice_and_never_the_weight(self):
    s = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.5]
    bias = [-9, 0, 0, 0, 0, 0, 0, 9]
    flat = dataclasses.replace(V3, groups=1, top_groups=1)
    experts, weights = choose(s, flat, 2, bias)
    self.assertEqual(experts, [7, 1])
    np.testing.assert_allclose(
      weights, np.array([0.5, 0.8]) / 1.3 * 2.5, rtol=1e-6
    )

  def test_negative_biased_scores_stay_ahead_of_masked_groups(self):
    # All biased scores are negative. Group 1 wins with -.1 and -.2; a mask of
    # 0 in place of -inf would let experts of group 0 or 2 in.
    cfg = RouterConfig(groups=3, top_groups=1, scale=1.0)
    s = [0.5, 0.5, 0.6, 0.5, 0.4, 0.4]
    bias = [-1.0, -1.0, -0.7, -0.7, -1.0, -1.0]
    experts, weights = choose(s, cfg, 2, bias)
    self.assertEqual(experts, [2, 3])
    np.testing.assert_allclose(weights, [0.6 / 1.1, 0.5 / 1.1], rtol=1e-6)

  @parameterized.parameters((GREEDY,), (V2,), (V3,))
  def test_ties_go_to_the_lowest_number(self, cfg):
    experts, _ = choose([0.125] * 8, cfg, 3)
    self.assertEqual(experts, [0, 1, 2])

  def test_limit_groups_masks_with_minus_infinity(self):
    z = jnp.array([-3.0, -4.0, -1.0, -2.0])
    cfg = RouterConfig(groups=2, top_groups=1)
    np.testing.assert_array_equal(
      lib.limit_groups(z, cfg), [-np.inf, -np.inf, -1, -2]
    )

  @parameterized.product(
    scoring=('softmax', 'sigmoid', 'sqrtsoftplus'),
    # Each alone underflows a score, a sum of scores or the square of one.
    low=(0, -30, -47, -60, -88, -110, -150, -1e4, 200),
  )
  def test_no_logit_makes_a_gradient_that_is_no_number(self, scoring, low):
    spread = np.random.default_rng(0).normal(size=(3, 8))
    logits = jnp.asarray(low + spread, jnp.float32)
    cfg = RouterConfig(scoring=scoring)
    slope = jnp.cos(jnp.arange(6.0)).reshape(3, 2)

    def layer(logits):
      scores = lib.score(logits, scoring)
      return lib.choose(scores, None, 2, cfg)[1]

    rule = kernel.Rule(scoring)
    op = lambda x: kernel.router(x, top_k=2, rule=rule, impl='reference')[1]
    for fn in (layer, op):
      weights, pull = jax.vjp(fn, logits)
      grad = pull(slope)[0]
      self.assertTrue(bool(jnp.isfinite(weights).all()))
      self.assertTrue(bool(jnp.isfinite(grad).all()), fn)
      if scoring == 'softmax' or abs(low) <= 30:
        # The weights of two are a sigmoid of how far they lie apart.
        exact = np.asarray(logits, np.float64)
        raw = {
          'softmax': lambda x: np.exp(x - x.max()),
          'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
          'sqrtsoftplus': lambda x: np.sqrt(np.log1p(np.exp(x))),
        }[scoring](exact)
        best = np.sort(raw, axis=-1)[:, ::-1][:, :2]
        np.testing.assert_allclose(
          weights, best / best.sum(-1, keepdims=True), rtol=1e-5
        )
        self.assertGreater(float(jnp.abs(grad).max()), 1e-3)

  def test_shares_have_no_scale(self):
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (3, 8)))
    want = lib.shares(scores)
    np.testing.assert_allclose(
      want, scores / scores.sum(-1, keepdims=True), rtol=1e-6
    )
    grad = jax.grad(lambda x: (lib.shares(x) ** 2).sum())
    for k in (20, 60, 100):
      s = 2.0**-k
      np.testing.assert_array_equal(lib.shares(scores * s), want)
      np.testing.assert_allclose(
        grad(scores * s) * s, grad(scores), rtol=1e-5, atol=1e-6
      )
    for none in (0.0, 1e-40):
      np.testing.assert_allclose(lib.shares(scores * none), 1 / 8)
      self.assertFalse(np.asarray(grad(scores * none)).any())

  def test_all_zero_scores_give_finite_weights(self):
    _, weights = choose([0.0] * 8, V3, 3)
    np.testing.assert_array_equal(weights, [0, 0, 0])


def build(router, dim=16, experts=8, top_k=3):
  cfg = MoEConfig(experts, top_k, 4, router=router)
  module = Router(router, dim, experts, top_k, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  weights = tiny.fill(nnx.to_pure_dict(state))
  return cfg, nnx.merge(graphdef, weights), reference.to_float64(weights)


class RouterTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('greedy', GREEDY),
    ('greedy_normalized', dataclasses.replace(GREEDY, normalize=True)),
    ('v2', V2),
    ('v3', V3),
    ('v3_one_group', dataclasses.replace(V3, groups=1, top_groups=1)),
    ('softmax_with_bias', dataclasses.replace(V2, bias=True)),
    ('sigmoid_max', dataclasses.replace(V3, group_score='max')),
  )
  def test_equals_a_loop_in_float64(self, router):
    cfg, module, weights = build(router)
    x = np.random.default_rng(2).normal(size=(2, 40, 16)).astype(np.float32)
    got = jax.jit(lambda x: module(x, Context(None, None, None)))(x)
    scores = reference.scores_of(weights, cfg, x)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-5)
    for b, t in np.ndindex(2, 40):
      chosen, w = reference.choose(scores[b, t], weights.get('bias'), cfg)
      self.assertEqual(got.experts[b, t].tolist(), chosen)
      np.testing.assert_allclose(got.weights[b, t], w, rtol=1e-5)

  def test_scores_are_float32_under_bfloat16(self):
    cfg, module, weights = build(V3)
    x = np.random.default_rng(2).normal(size=(1, 40, 16))
    x = jnp.asarray(x, jnp.bfloat16)
    got = module(x, Context(None, None, None))
    self.assertEqual(got.scores.dtype, jnp.float32)
    self.assertEqual(got.weights.dtype, jnp.float32)
    want = reference.scores_of(weights, cfg, np.asarray(x, np.float64))
    np.testing.assert_allclose(got.scores, want, rtol=1e-5)

  def test_padding_goes_nowhere(self):
    _, module, _ = build(V3)
    segments = jnp.array([[1, 1, 0], [2, 0, 0]])
    got = module(jnp.ones((2, 3, 16)), Context(None, None, segments))
    away = np.asarray(segments) == 0
    np.testing.assert_array_equal(got.experts[away], 8)
    np.testing.assert_array_equal(got.weights[away], 0)
    self.assertLess(int(got.experts[~away].max()), 8)
    self.assertGreater(float(got.weights[~away].min()), 0)

  def test_no_gradient_reaches_the_bias(self):
    scores = jax.nn.sigmoid(jnp.arange(8.0) / 4)
    total = lambda s, b: (lib.choose(s, b, 3, V3)[1] ** 2).sum()
    to_scores, to_bias = jax.grad(total, argnums=(0, 1))(scores, jnp.ones(8))
    np.testing.assert_array_equal(to_bias, 0)
    self.assertEqual(int((to_scores != 0).sum()), 3)

  @parameterized.parameters(
    ({'groups': 3}, 3, r'router\.groups = 3: must divide experts = 8'),
    ({'groups': 0}, 3, r'router\.groups = 0'),
    (
      {'groups': 4, 'top_groups': 5},
      3,
      r'router\.top_groups = 5: must lie in 1\.\.groups = 4',
    ),
    (
      {'groups': 4, 'top_groups': 1},
      3,
      'top_k = 3: more than the 2 experts of 1 groups',
    ),
    ({'groups': 8, 'top_groups': 8}, 3, "router.group_score = 'top2': needs"),
    ({}, 9, r'top_k = 9: must lie in 1\.\.experts = 8'),
    ({}, 0, r'top_k = 0: must be at least 1$'),
  )
  def test_settings_that_do_not_fit_are_refused(self, fields, top_k, message):
    with self.assertRaisesRegex(ds.InputError, message):
      MoEConfig(8, top_k, 4, router=RouterConfig(**fields))

  def test_groups_of_one_may_count_by_their_best(self):
    MoEConfig(8, 3, 4, router=dataclasses.replace(V2, groups=8, top_groups=3))


if __name__ == '__main__':
  absltest.main()
