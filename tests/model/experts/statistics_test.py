"""Statistics of the routing against loops over tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.model.experts import statistics as routing_statistics
from deepseek_jax.model.experts.router import RouterConfig, Routing, choose

B, T = 2, 12


def _routing(cfg, bias, *, experts=8, top_k=3, padding=0, seed=0):
  rng = np.random.default_rng(seed)
  scores = rng.random((B, T, experts)).astype(np.float32)
  chosen, weights = choose(jnp.asarray(scores), bias, top_k, cfg)
  chosen = np.array(chosen)
  if padding:
    chosen[:, -padding:] = experts
  return Routing(jnp.asarray(chosen), weights, jnp.asarray(scores))


class StatisticsTest(parameterized.TestCase):
  @parameterized.parameters(
    (RouterConfig(), 8, 0),
    (RouterConfig(groups=4, top_groups=2), 8, 3),
    (RouterConfig(groups=4, top_groups=2, group_score='max'), 8, 0),
    (RouterConfig(), 130, 2),
  )
  def test_sums_equal_loops_over_tokens(self, cfg, experts, padding):
    rng = np.random.default_rng(1)
    bias = rng.normal(0, 0.2, experts).astype(np.float32)
    routing = _routing(cfg, bias, experts=experts, padding=padding)
    got = jax.jit(routing_statistics.statistics, static_argnums=2)(
      routing, bias, cfg
    )
    G = routing_statistics.groups(experts)
    entropy, moved, together = 0.0, 0, np.zeros((G, G), int)
    alone = np.asarray(choose(routing.scores, None, 3, cfg)[0])
    for b, t in itertools.product(range(B), range(T - padding)):
      p = np.asarray(routing.scores[b, t], np.float64)
      p /= p.sum()
      entropy -= (p * np.log(p)).sum() / np.log(experts)
      chosen = set(np.asarray(routing.experts[b, t]).tolist())
      moved += chosen != set(alone[b, t].tolist())
      for i, j in itertools.product(chosen, chosen):
        together[i * G // experts, j * G // experts] += 1
    np.testing.assert_allclose(got['entropy'], entropy, rtol=1e-5)
    self.assertEqual(int(got['moved']), moved)
    self.assertGreater(moved, 0)
    np.testing.assert_array_equal(got['together'], together)
    self.assertEqual(got['together'].sum(), B * (T - padding) * 9)

  def test_few_experts_are_groups_of_one_and_the_diagonal_is_the_load(self):
    routing = _routing(RouterConfig(), None)
    got = routing_statistics.statistics(routing, None, RouterConfig())
    load = np.bincount(np.ravel(routing.experts), minlength=8)
    np.testing.assert_array_equal(np.diag(got['together']), load)
    self.assertEqual(int(got['moved']), 0)

  def test_a_bias_of_zero_moves_nothing_and_a_large_one_everything(self):
    cfg = RouterConfig()
    for bias, want in ((np.zeros(8), 0), (np.arange(8) * 9.0, B * T)):
      bias = bias.astype(np.float32)
      routing = _routing(cfg, bias)
      # The three best by score are not the last three in any token here.
      got = routing_statistics.statistics(routing, bias, cfg)
      alone = np.sort(choose(routing.scores, None, 3, cfg)[0], axis=-1)
      want -= want and int((alone == [5, 6, 7]).all(axis=-1).sum())
      self.assertEqual(int(got['moved']), want)

  def test_entropy_has_no_scale(self):
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (3, 8)))
    want = routing_statistics.entropy(scores)
    for s in (1e-10, 1e-21, 1e-36, 1e30):
      np.testing.assert_allclose(
        routing_statistics.entropy(scores * s), want, rtol=1e-5
      )
    np.testing.assert_allclose(
      routing_statistics.entropy(0 * scores), 1, rtol=1e-6
    )

  def test_entropy_is_0_for_one_and_1_for_all(self):
    one = np.eye(5, dtype=np.float32)
    np.testing.assert_allclose(routing_statistics.entropy(one), 0, atol=1e-6)
    even = np.full((3, 5), 0.3, np.float32)
    np.testing.assert_allclose(routing_statistics.entropy(even), 1, rtol=1e-6)
    nothing = routing_statistics.entropy(np.zeros((1, 5), np.float32))
    self.assertTrue(np.isfinite(nothing).all())

  @parameterized.parameters(
    (8, 8), (64, 64), (256, 64), (160, 40), (130, 26), (67, 1), (1, 1)
  )
  def test_pairs_are_of_at_most_64_groups(self, experts, want):
    self.assertEqual(routing_statistics.groups(experts), want)


if __name__ == '__main__':
  absltest.main()
