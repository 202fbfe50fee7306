"""Balance losses against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.experts import balance as lib
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import Routing
from tests import reference

B, T, E, K, DEVICES, LIMIT = 3, 10, 8, 3, 4, 2


def routing():
  """Scores, and choices that are not the best scores; with padding."""
  rng = np.random.default_rng(0)
  scores = rng.uniform(0.01, 1, (B, T, E)).astype(np.float32)
  chosen = np.stack(
    [[rng.permutation(E)[:K] for _ in range(T)] for _ in range(B)]
  ).astype(np.int32)
  valid = np.ones((B, T), bool)
  valid[1, 7:] = False
  chosen[~valid] = E
  made = Routing(jnp.asarray(chosen), jnp.ones((B, T, K)), jnp.asarray(scores))
  return made, np.float64(scores), chosen.tolist(), valid


class LossTest(parameterized.TestCase):
  def test_sequence_loss_counts_the_best_raw_scores(self):
    made, scores, _, valid = routing()
    got = lib.sequence_loss(made.scores, K, jnp.asarray(valid))
    want = np.mean(
      [reference.sequence_loss(s, K, v) for s, v in zip(scores, valid)]
    )
    self.assertAlmostEqual(float(got), want, delta=1e-5)

  @parameterized.parameters(-60.0, -90.0, -120.0, -1e4)
  def test_scores_that_underflow_leave_the_sequence_loss_a_number(self, low):
    logits = low + jax.random.normal(jax.random.key(0), (2, 5, 8))
    valid = jnp.ones((2, 5), bool)
    loss = lambda x: lib.sequence_loss(jax.nn.sigmoid(x), 2, valid)
    value, grad = jax.value_and_grad(loss)(logits)
    self.assertTrue(bool(jnp.isfinite(grad).all()))
    # The shares of sigmoids far below 0 are a softmax.
    if low > -80:
      want = lib.sequence_loss(jax.nn.softmax(logits), 2, valid)
      np.testing.assert_allclose(value, want, rtol=1e-5)
    self.assertBetween(float(value), 0.5, 4.0)

  def test_v2_losses_count_the_actual_choices(self):
    made, scores, chosen, valid = routing()
    cfg = BalanceConfig(
      expert=1.0,
      device=1.0,
      communication=1.0,
      devices=DEVICES,
      device_limit=LIMIT,
    )
    got = lib.losses(cfg, made, jnp.asarray(valid))
    each = [
      reference.v2_losses(s, c, K, v, DEVICES, LIMIT)
      for s, c, v in zip(scores, chosen, valid)
    ]
    self.assertCountEqual(got, ['expert', 'device', 'communication'])
    for name, value in got.items():
      want = np.mean([one[name] for one in each])
      self.assertAlmostEqual(float(value), want, delta=1e-5, msg=name)

  def test_even_use_gives_1(self):
    # With equal scores and every expert used alike f = 1 and P sums to 1.
    experts = jnp.arange(24).reshape(1, 8, 3) % E
    scores = jnp.full((1, 8, E), 1 / E)
    made = Routing(experts, jnp.ones((1, 8, 3)), scores)
    valid = jnp.ones((1, 8), bool)
    self.assertAlmostEqual(float(lib.expert_loss(made, valid)), 1, places=6)
    device = lib.device_loss(made, valid, DEVICES)
    self.assertAlmostEqual(float(device), 1, places=6)

  def test_gradients_flow_through_the_scores_only(self):
    made, scores, chosen, valid = routing()
    cfg = BalanceConfig(0.5, 0.3, 0.2, 0.1, DEVICES, LIMIT)
    valid = jnp.asarray(valid)

    def total(s):
      return lib.weighted(cfg, lib.losses(cfg, made._replace(scores=s), valid))

    def wanted(s):
      moe = MoEConfig(E, K, 4, balance=cfg)
      return np.mean(
        [
          reference.balance_loss(moe, s[b], chosen[b], np.asarray(valid[b]))
          for b in range(B)
        ]
      )

    self.assertAlmostEqual(
      float(total(made.scores)), wanted(scores), delta=1e-5
    )
    grad = jax.grad(total)(made.scores)
    direction = np.random.default_rng(1).normal(size=scores.shape)
    step = 1e-6 * direction
    want = (wanted(scores + step) - wanted(scores - step)) / 2e-6
    self.assertAlmostEqual(
      float((np.float64(grad) * direction).sum()), want, delta=1e-6
    )

  def test_a_weight_of_0_leaves_a_loss_out(self):
    made, *_ = routing()
    self.assertEqual(lib.losses(BalanceConfig(), made, None), {})
    self.assertEqual(float(lib.weighted(BalanceConfig(), {})), 0)
    self.assertEqual(
      [*lib.losses(BalanceConfig(sequence=1e-4), made, None)], ['sequence']
    )

  def test_weights_multiply_their_own_loss(self):
    cfg = BalanceConfig(1e-4, 2.0, 3.0, 5.0)
    values = {'sequence': 1.0, 'expert': 10.0, 'device': 1.0}
    values['communication'] = 100.0
    self.assertAlmostEqual(
      float(lib.weighted(cfg, values)), 1e-4 + 20 + 3 + 500, places=3
    )

  def test_devices_must_divide_the_experts(self):
    with self.assertRaisesRegex(
      ds.InputError, r'balance\.devices = 3: must divide experts = 8'
    ):
      MoEConfig(E, K, 4, balance=BalanceConfig(device=0.1, devices=3))


class UpdatedBiasTest(parameterized.TestCase):
  def test_moves_by_the_sign_alone_and_rests_at_the_mean(self):
    load = jnp.array([[0, 10, 5, 5], [3, 3, 3, 3]])
    bias = jnp.array([[0.5, 0.5, 0.5, -0.5], [1.0, 2.0, 3.0, 4.0]])
    got = lib.updated_bias(bias, load, 0.25)
    np.testing.assert_array_equal(
      got, [[0.75, 0.25, 0.5, -0.5], [1.0, 2.0, 3.0, 4.0]]
    )

  def test_a_rate_of_0_freezes(self):
    bias = jnp.array([0.1, -0.2])
    got = lib.updated_bias(bias, jnp.array([9, 1]), jnp.float32(0))
    np.testing.assert_array_equal(got, bias)

  def test_counts_of_2_to_24_and_more_are_told_apart(self):
    # 2^24 + 2 against a mean of 2^24 + 1: even there the sign is right.
    load = jnp.array([2**24 + 4, 2**24], jnp.int32)
    got = lib.updated_bias(jnp.zeros(2), load, 1.0)
    np.testing.assert_array_equal(got, [-1, 1])


if __name__ == '__main__':
  absltest.main()
