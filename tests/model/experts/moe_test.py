"""The MoE layer against a loop over tokens; capacity against a loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.capacity import CapacityConfig, drop, exempted
from deepseek_jax.model.experts.moe import (
  MoE,
  MoEConfig,
  apply_experts,
)
from deepseek_jax.model.experts.router import RouterConfig, Routing
from tests import reference, tiny

DIM, B, T = 16, 2, 24
TOKENS = np.random.default_rng(2).integers(0, 64, (B, T)).astype(np.int32)
CONFIGS = {
  'v3': tiny.V3_MOE,
  'v2': tiny.V2_MOE,
  'greedy': tiny.GREEDY_MOE,
  'routed_only': dataclasses.replace(tiny.V3_MOE, shared=0),
}


@functools.cache
def built(name):
  cfg = CONFIGS.get(name) or CAPACITY
  graphdef, state = nnx.split(MoE(cfg, DIM, std=1.0, rngs=nnx.Rngs(0)))
  return graphdef, tiny.fill(nnx.to_pure_dict(state))


@functools.cache
def jitted(name, train=True):
  graphdef, _ = built(name)

  def run(weights, x, segments):
    ctx = Context(TOKENS, None, segments, train=train)
    return nnx.merge(graphdef, weights)(x, ctx)

  return jax.jit(run)


def inputs(dtype=jnp.float32):
  x = np.random.default_rng(3).normal(size=(B, T, DIM))
  segments = np.ones((B, T), np.int32)
  segments[1, 17:] = 0
  return jnp.asarray(x, dtype), jnp.asarray(segments)


def wanted(cfg, weights, x, segments):
  """y [B T D], load [E], the weighted balance loss."""
  weights = reference.to_float64(weights)
  bias = weights['router'].get('bias')
  ys, loads, losses = [], [], []
  for row, valid in zip(np.asarray(x, np.float64), np.asarray(segments) > 0):
    y, load, chosen, s = reference.moe(weights, bias, cfg, row, valid)
    ys.append(y)
    loads.append(load)
    losses.append(reference.balance_loss(cfg, s, chosen, valid))
  return np.stack(ys), sum(loads), np.mean(losses)


class MoETest(parameterized.TestCase):
  @parameterized.parameters(*CONFIGS)
  def test_equals_a_loop_over_tokens_in_float64(self, name):
    weights = built(name)[1]
    x, segments = inputs()
    y, stats = jitted(name)(weights, x, segments)
    want, load, loss = wanted(CONFIGS[name], weights, x, segments)
    # float32: three sums of up to 16 terms in a row.
    self.assertLess(tiny.relative(y, want), 3e-6)
    np.testing.assert_array_equal(stats['load'], load)
    self.assertAlmostEqual(float(stats['loss']), loss, delta=1e-5 * loss)
    self.assertEqual(int(stats['dropped']), 0)

  @parameterized.parameters('v3', 'v2')
  def test_few_tokens_equal_the_loop_too(self, name):
    # A decoding batch: most blocks are one row.
    weights = built(name)[1]
    x, segments = inputs()
    x, segments = x[:, 14:19], segments[:, 14:19]
    y, stats = jitted(name)(weights, x, segments)
    want, load, _ = wanted(CONFIGS[name], weights, x, segments)
    self.assertLess(tiny.relative(y, want), 3e-6)
    np.testing.assert_array_equal(stats['load'], load)

  def test_bfloat16_routes_alike_and_differs_by_rounding(self):
    x, segments = inputs(jnp.bfloat16)
    weights = built('v3')[1]
    low = {
      k: jax.tree.map(lambda w: w.astype(jnp.bfloat16), v)
      if k != 'router'
      else v
      for k, v in weights.items()
    }
    y, stats = jitted('v3')(low, x, segments)
    self.assertEqual(y.dtype, jnp.bfloat16)
    want, load, _ = wanted(CONFIGS['v3'], low, x, segments)
    np.testing.assert_array_equal(stats['load'], load)
    # Three roundings to 8 bits in a row.
    self.assertLess(tiny.relative(y, want), 1e-2)

  def test_decoding_in_bfloat16_is_the_training_forward(self):
    """Few tokens make other blocks, which round at the same places."""
    x, segments = inputs(jnp.bfloat16)
    for name in ('v3', 'v2'):
      low = lambda path, w: w if 'router' in str(path) else jnp.bfloat16(w)
      weights = jax.tree_util.tree_map_with_path(low, built(name)[1])
      want = np.float64(jitted(name)(weights, x, segments)[0][:, 10:14])
      few = jitted(name)(weights, x[:, 10:14], segments[:, 10:14])[0]
      gap = np.abs(np.float64(few) - want)
      # Sums in another order: now and then the last of 8 bits. Rounded gates
      # changed half of all numbers.
      self.assertLess((gap > 0).mean(), 0.03, name)
      self.assertLess((gap / np.abs(want)).max(), 2.0**-7, name)

  def test_experts_that_nobody_chose_give_nothing_to_few_tokens(self):
    weights = built('v3')[1]
    x, segments = inputs()
    x, segments = x[:, 14:16], segments[:, 14:16]
    y, stats = jitted('v3')(weights, x, segments)
    unused = np.flatnonzero(np.asarray(stats['load']) == 0)
    self.assertNotEmpty(unused)
    broken = weights | {
      name: weights[name].at[unused].set(np.nan) for name in ('gate_up', 'down')
    }
    np.testing.assert_array_equal(jitted('v3')(broken, x, segments)[0], y)

  def test_float8_is_the_product_of_rounded_factors(self):
    # Values and gradients near those without it, and not the same. The chain
    # rounds two factors of 3 bits twice: about 5 % of the size in all.
    cfg = MoEConfig(8, 2, width=128, shared=0)
    x = jax.random.normal(jax.random.key(1), (1, 96, 128))
    ctx = Context(None, None, None, train=True)

    def run(cfg, x):
      graphdef, state = nnx.split(MoE(cfg, 128, std=0.1, rngs=nnx.Rngs(0)))
      weights = nnx.to_pure_dict(state)
      apply = lambda w, x: nnx.merge(graphdef, w)(x, ctx)[0]
      loss = lambda w, x: (apply(w, x) ** 2).sum()
      return apply(weights, x), jax.grad(loss)(weights, x)

    run = jax.jit(run, static_argnums=0)
    exact = run(cfg, x)
    eight = dataclasses.replace(cfg, float8=True)
    rough = run(eight, x)
    for name in ('gate_up', 'down'):
      error = tiny.relative(rough[1][name], exact[1][name])
      self.assertBetween(error, 0.01, 0.15, name)
    self.assertBetween(tiny.relative(rough[0], exact[0]), 0.01, 0.1)
    # A row has its own scales: a decoding batch gets the same numbers.
    np.testing.assert_allclose(
      run(eight, x[:, :3])[0], rough[0][:, :3], rtol=1e-5, atol=1e-5
    )

  @parameterized.parameters('float32', 'bfloat16')
  def test_float8_gradients_have_one_error_at_every_scale(self, dtype):
    # The loss is a mean over the global batch, so V3's 62.9M tokens make
    # gradients 2^-26 times as small as one token's.
    rng = np.random.default_rng(0)
    N, D, E, K, F = 48, 128, 4, 2, 128
    draw = lambda *s: jnp.asarray(rng.normal(size=s), dtype)
    args = draw(N, D), 0.05 * draw(E, D, 2, F), 0.05 * draw(E, F, D)
    experts = np.argsort(rng.random((N, E)), axis=1)[:, :K].astype(np.int32)
    gates = jnp.asarray(rng.random((N, K)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(slope, float8):
      run = lambda x, up, down: apply_experts(
        x, experts, gates, up, down, float8=float8
      )
      return jax.vjp(run, *args)[1](slope)

    slope = draw(N, D)
    exact = gradients(slope, False)
    first = gradients(slope, True)
    for k in (0, 10, 26, 40, 60):
      s = jnp.asarray(2.0**-k, dtype)
      for one, got, want in zip(first, gradients(slope * s, True), exact):
        got = np.asarray(got, np.float64) * 2.0**k
        error = np.linalg.norm(got - np.asarray(want, np.float64))
        error /= np.linalg.norm(np.asarray(want, np.float64))
        self.assertBetween(error, 0.03, 0.09, f'2^-{k}')
        np.testing.assert_array_equal(got, np.asarray(one, np.float64))

  def test_float8_refuses_widths_without_whole_blocks(self):
    cfg = dataclasses.replace(tiny.V3_MOE, float8=True)
    layer = MoE(cfg, DIM, std=1.0, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(
      ds.InputError, 'moe.float8: .*multiples of 128'
    ):
      layer(inputs()[0], Context(None, None, None))

  @parameterized.parameters('v3', 'v2', 'greedy')
  def test_dropless_loads_add_up_to_tokens_times_k(self, name):
    x, segments = inputs()
    one = x.at[:].set(x[0, 0])  # all choose the same experts
    for batch in (x, one):
      _, stats = jitted(name)(built(name)[1], batch, segments)
      tokens = int((segments > 0).sum())
      self.assertEqual(int(stats['load'].sum()), tokens * 3)
      self.assertEqual(int(stats['dropped']), 0)

  def test_permuting_the_experts_changes_nothing(self):
    name = 'greedy'  # one group, so any order keeps the choice
    weights = built(name)[1]
    x, segments = inputs()
    order = np.random.default_rng(0).permutation(8)
    router = jax.tree.map(lambda w: w[..., order], weights['router'])
    other = {
      **weights,
      'router': router,
      'gate_up': weights['gate_up'][order],
      'down': weights['down'][order],
    }
    y, stats = jitted(name)(weights, x, segments)
    z, moved = jitted(name)(other, x, segments)
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(moved['load'], stats['load'][order])
    np.testing.assert_allclose(moved['loss'], stats['loss'], rtol=1e-6)

  def test_permuting_whole_groups_changes_nothing(self):
    weights = built('v3')[1]
    x, segments = inputs()
    order = np.array([6, 7, 1, 0, 4, 5, 3, 2])  # groups and within them
    router = jax.tree.map(lambda w: w[..., order], weights['router'])
    other = {
      **weights,
      'router': router,
      'gate_up': weights['gate_up'][order],
      'down': weights['down'][order],
    }
    y, _ = jitted('v3')(weights, x, segments)
    z, _moved = jitted('v3')(other, x, segments)
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-5)

  def test_a_common_bias_changes_nothing_and_a_single_one_the_choice(self):
    weights = built('v3')[1]
    x, segments = inputs()
    moved = lambda by: {
      **weights,
      'router': {**weights['router'], 'bias': weights['router']['bias'] + by},
    }
    y, stats = jitted('v3')(weights, x, segments)
    z, same = jitted('v3')(moved(5.0), x, segments)
    np.testing.assert_array_equal(same['experts'], stats['experts'])
    np.testing.assert_array_equal(z, y)
    _, drawn = jitted('v3')(moved(jnp.eye(8)[2] * 9), x, segments)
    self.assertEqual(int(drawn['load'][2]), int((segments > 0).sum()))

  @parameterized.parameters(
    ({'experts': 0}, 'experts = 0'),
    ({'width': 0}, 'width = 0'),
    ({'shared': -1}, 'shared = -1'),
    (
      {'capacity': CapacityConfig(devices=3)},
      r'capacity\.devices = 3: must divide experts = 8',
    ),
  )
  def test_shapes_that_do_not_fit_are_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      MoEConfig(**{'experts': 8, 'top_k': 2, 'width': 4, **fields})


CAPACITY = dataclasses.replace(
  tiny.GREEDY_MOE,
  router=RouterConfig(bias=False, scale=1.0),
  capacity=CapacityConfig(factor=0.75, devices=4, exempt=0.5),
)


_DROP = jax.jit(drop, static_argnums=(1, 2))


def dropped_by_hand(experts, weights, cfg, num_experts, exempt):
  """Which choices lose their place [B T K], one sequence and device at a time.

  V2 section 2.2.4, with a budget of each sequence.
  """
  size = num_experts // cfg.devices
  lost = np.zeros(experts.shape, bool)
  for b in np.flatnonzero(np.logical_not(exempt)):
    budget = cfg.factor * (experts[b] < num_experts).sum() / cfg.devices
    for d in range(cfg.devices):
      here = np.argwhere(experts[b] // size == d)
      ranked = sorted(map(tuple, here), key=lambda i, b=b: -weights[(b, *i)])
      for rank, i in enumerate(ranked):
        lost[(b, *i)] = rank >= budget
  return lost


class CapacityTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.5, 2, 2), (1.0, 8, 0), (1.0, 2, 4), (1.3, 1, 0), (0.5, 8, 8)
  )
  def test_drops_the_lowest_affinities_of_a_full_device(
    self, factor, devices, exempt
  ):
    cfg = CapacityConfig(factor, devices)
    rng = np.random.default_rng(0)
    free = np.arange(8) < exempt
    shares = np.arange(1, 9) / 36  # uneven, so that devices overflow
    experts = np.stack(
      [
        [rng.choice(8, 3, replace=False, p=shares) for _ in range(10)]
        for _ in range(8)
      ]
    ).astype(np.int32)
    experts[3, 6:] = 8
    weights = rng.permutation(240).reshape(8, 10, 3).astype(np.float32) + 1
    weights[experts == 8] = 0
    made = Routing(jnp.asarray(experts), jnp.asarray(weights), None)
    got, count = _DROP(made, 8, cfg, free)
    lost = dropped_by_hand(experts, weights, cfg, 8, free)
    np.testing.assert_array_equal(got.experts, np.where(lost, 8, experts))
    np.testing.assert_array_equal(got.weights, np.where(lost, 0, weights))
    self.assertEqual(int(count), lost.sum())
    if factor < 1 and exempt < 8:
      self.assertGreater(int(count), 0)

  def test_a_sequence_loses_the_same_alone_and_in_any_batch(self):
    cfg = CapacityConfig(0.7, 4)
    rng = np.random.default_rng(1)
    experts = jnp.asarray(rng.integers(0, 8, (6, 10, 3)), jnp.int32)
    # Affinities of few values, so that many are equal.
    weights = jnp.asarray(rng.integers(1, 4, (6, 10, 3)), jnp.float32)
    free = np.arange(6) == 4
    whole, count = _DROP(Routing(experts, weights, None), 8, cfg, free)
    order, total = np.array([3, 1, 4, 5, 0, 2]), 0
    for rows in np.split(order, [1, 3]):
      part = Routing(experts[rows], weights[rows], None)
      got, lost = _DROP(part, 8, cfg, free[rows])
      np.testing.assert_array_equal(got.experts, whole.experts[rows])
      np.testing.assert_array_equal(got.weights, whole.weights[rows])
      total += int(lost)
    self.assertEqual(total, int(count))
    self.assertGreater(total, 0)

  def test_shifted_tokens_exempt_the_same_sequences(self):
    tokens = np.random.default_rng(0).integers(0, 64, (400, 12))
    free = np.asarray(exempted(jnp.asarray(tokens, jnp.int32), 0.4))
    shifted = np.roll(tokens, -1, axis=1)
    again = exempted(jnp.asarray(shifted, jnp.int32), 0.4)
    np.testing.assert_array_equal(again, free)
    self.assertBetween(free.mean(), 0.3, 0.5)

  @parameterized.parameters(0.0, 0.1, 0.7, 1.0)
  def test_exempts_this_share_of_sequences_in_any_batch(self, share):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (4000, 12)).astype(np.int32)
    tokens[1::2] = tokens[::2]  # neighbours differ in one token
    tokens[1::2, 5] += 1
    free = np.asarray(exempted(tokens, share))
    # Five standard deviations of 4,000 draws.
    slack = 5 * np.sqrt(share * (1 - share) / 4000)
    self.assertAlmostEqual(free.mean(), share, delta=slack)
    both = (free[::2] & free[1::2]).mean()
    self.assertAlmostEqual(both, share**2, delta=slack * 2**0.5)
    alone = [bool(exempted(row[None], share)[0]) for row in tokens[:40]]
    self.assertEqual(alone, free[:40].tolist())

  def test_drops_in_training_and_never_in_evaluation(self):
    weights = built('capacity')[1]
    x, segments = inputs()
    full = segments * 0 + 1
    y, stats = jitted('capacity', train=False)(weights, x, full)
    self.assertEqual(int(stats['dropped']), 0)
    z, trained = jitted('capacity')(weights, x, full)
    self.assertGreater(int(trained['dropped']), 0)
    # Loads count what was asked for, so that balancing sees the overflow.
    np.testing.assert_array_equal(trained['load'], stats['load'])
    changed = np.abs(np.asarray(z - y)).max(axis=(1, 2)) > 1e-6
    free = np.asarray(exempted(TOKENS, 0.5)).tolist()
    self.assertCountEqual(free, [False, True])
    self.assertEqual(changed.tolist(), np.logical_not(free).tolist())


if __name__ == '__main__':
  absltest.main()
