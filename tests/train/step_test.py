"""The training step against float64 and against itself."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.experts.capacity import CapacityConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.train import step as train
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.gate import GateConfig
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.objective import Shares
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)
from deepseek_jax.train.update import move_biases
from tests import reference, tiny

B, T = 8, 12
# Smooth in the gradient: with a tiny eps, Adam divides rounding by rounding.
SMOOTH = OptimizerConfig(eps=1e-3, decay=0.01)
RECIPE = TrainConfig(
  tokens=1e6,
  batch=BatchConfig(B),
  optimizer=SMOOTH,
  schedule=ScheduleConfig('constant', peak=0.01, warmup=0),
  gate=GateConfig(warmup=1000),
  mtp_weight=SwitchConfig(0.3, 0.0, 0.5),
  bias_rate=SwitchConfig(0.01, 0.0, 0.25),
)


@functools.cache
def jitted(accumulate=1, name='step'):
  cfg = dataclasses.replace(RECIPE, batch=BatchConfig(B, accumulate=accumulate))
  step = train.train_step(tiny.model(name), cfg)
  return jax.jit(step, donate_argnums=0)


def initial(name='step'):
  """A state of its own buffers, as the step takes them away."""
  variables = jax.tree.map(jnp.array, tiny.variables(name))
  return train.initial_state(tiny.model(name), RECIPE, variables)


def batch(seed=0, padding=5):
  return tiny.documents(B, T + 1, seed, padding)


def share_of_run(share):
  return jnp.uint32(share * RECIPE.tokens / T)


def copied(tree):
  return jax.tree.map(np.array, tree)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def small_batch():
  return jax.tree.map(lambda a: a[-2:], batch())


@functools.cache
def gradient(name):
  """Jitted loss, metrics and gradient of two sequences."""

  def loss(params, buffers, batch, count, mtp_weight):
    variables = {'params': params, 'buffers': buffers}
    return train.loss_and_metrics(
      tiny.model(name),
      variables,
      batch,
      Shares(count, 1, mtp_weight),
      tiny.PRETRAINING,
    )

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


class LossTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v3', False), ('dense_mtp', False), ('dense_mtp', True)
  )
  def test_loss_and_gradient_equal_float64(self, name, cross_document):
    cfg, data = tiny.config(name), small_batch()
    weights = reference.to_float64(tiny.variables(name))
    value = lambda w: reference.loss(cfg, w, data, 0.3, cross_document)
    want, parts, loads = value(weights)
    segments = data['segments']
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    real = segments > 0
    count = (real[:, 1:] & real[:, :-1] if cross_document else inside).sum()
    self.assertLess(count, 2 * T)
    self.assertLess(int(inside.sum()), 2 * T - 4)
    variables = tiny.variables(name)
    given = tiny.together(data) if cross_document else data
    (loss, metrics), grads = gradient(name)(
      variables['params'], variables['buffers'], given, float(count), 0.3
    )
    self.assertAlmostEqual(float(loss), want, delta=2e-5)
    for part in parts:
      got = float(metrics.get(part, 0.0))
      self.assertAlmostEqual(got, parts[part], delta=2e-5, msg=part)
    if name == 'v3':
      stacked = (
        metrics['loads']['segments/1/0'],
        metrics['loads']['mtp/0/block'],
      )
      np.testing.assert_array_equal(np.vstack(stacked), loads)
      np.testing.assert_array_equal(metrics['load'], loads[:2])
    for seed in range(3):
      direction = jax.tree.map(np.float64, tiny.fill(variables['params'], seed))
      moved = lambda h, d=direction: {
        **weights,
        'params': jax.tree.map(lambda w, x: w + h * x, weights['params'], d),
      }
      slope = (value(moved(1e-6))[0] - value(moved(-1e-6))[0]) / 2e-6
      products = jax.tree.map(
        lambda g, x: (np.float64(g) * x).sum(), grads, direction
      )
      got = sum(jax.tree.leaves(products))
      size = np.sqrt(
        sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads))
      )
      self.assertAlmostEqual(got / size, slope / size, delta=2e-5)

  def test_both_losses_divide_by_all_tokens_of_the_global_batch(self):
    # V3 divides the MTP loss by T too, not by the T - k that have a target.
    variables = tiny.variables('dense_mtp')
    data = tiny.together(small_batch())
    run = lambda count: gradient('dense_mtp')(
      variables['params'], variables['buffers'], data, count, 0.3
    )[0][1]
    one, two = run(24.0), run(12.0)
    for part in ('loss', 'mtp_loss'):
      self.assertAlmostEqual(float(two[part] / one[part]), 2, places=5)


class StepTest(parameterized.TestCase):
  def test_accumulation_changes_no_number(self):
    """Micro-batches hold unequal numbers of predicted tokens."""
    want, seen = jitted()(initial(), batch())
    got, metrics = jitted(8)(initial(), batch())
    np.testing.assert_array_equal(metrics['load'], seen['load'])
    same(got.buffers, want.buffers)
    for name in ('loss', 'mtp_loss', 'balance_loss', 'grad_norm'):
      np.testing.assert_allclose(metrics[name], seen[name], rtol=2e-6)
    # The first moments are the gradients, clipped, times 0.1.
    for a, b in zip(*(jax.tree.leaves(s.moments[1].mu) for s in (got, want))):
      self.assertLess(tiny.relative(a, b), 1e-5)
    # An update is 0.01; rounding moves it by a thousandth of that at most.
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, got.params, want.params)
    moved = jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).max()),
      want.params,
      initial().params,
    )
    self.assertGreater(min(jax.tree.leaves(moved)), 1e-6)

  def test_accumulation_drops_the_same_tokens(self):
    """V2's capacity is a budget of each sequence, not of a micro-batch."""
    config = ds.changed(tiny.config('step'), {'mtp.depth': 0})
    capacity = CapacityConfig(factor=0.8, devices=4, exempt=0.25)
    model = ds.build(ds.changed(config, {'moe.capacity': capacity}))
    variables = jax.tree.map(jnp.array, tiny.draw(model))
    begun = train.initial_state(model, RECIPE, variables)
    seen = {}
    for n in (1, 4):
      cfg = dataclasses.replace(RECIPE, batch=BatchConfig(B, accumulate=n))
      step = train.train_step(model, cfg)
      seen[n] = jax.jit(step)(begun, batch())[1]
    self.assertGreater(seen[1]['dropped'].sum(), 0)
    np.testing.assert_array_equal(seen[4]['dropped'], seen[1]['dropped'])
    for name in ('loss', 'balance_loss', 'grad_norm'):
      np.testing.assert_allclose(seen[4][name], seen[1][name], rtol=2e-6)

  def test_loads_count_every_choice_of_the_global_batch(self):
    _, metrics = jitted(8)(initial(), batch())
    tokens = int((batch()['segments'][:, :-1] > 0).sum())
    np.testing.assert_array_equal(metrics['load'].sum(axis=1), tokens * 3)
    np.testing.assert_array_equal(metrics['dropped'], 0)

  def test_biases_move_by_the_sign_of_the_global_load(self):
    before = copied(initial().buffers)
    state, metrics = jitted(8)(initial(), batch())
    load = np.float64(metrics['load'])
    error = np.sign(load.mean(axis=1, keepdims=True) - load)
    bias = lambda b: b['segments'][0][0]['ffn']['router']['bias']
    np.testing.assert_allclose(
      bias(state.buffers), bias(before) + 0.01 * error, atol=1e-7
    )

  def test_every_bias_moves_by_the_load_of_its_own_layer(self):
    buffers = tiny.variables('v3')['buffers']
    one = lambda e: 90 * np.eye(8)[e]
    loads = {
      'segments/0/0': one(7),  # a dense layer has no bias
      'segments/1/0': np.stack([one(2), one(5)]),
      'mtp/0/block': one(4),
    }
    moved = move_biases(buffers, loads, 0.5)
    bias = lambda b: [
      *b['segments'][1][0]['ffn']['router']['bias'],
      b['mtp'][0]['block']['ffn']['router']['bias'],
    ]
    for new, old, hot in zip(bias(moved), bias(buffers), (2, 5, 4)):
      np.testing.assert_allclose(new - old, 0.5 - np.eye(8)[hot], atol=1e-6)
    same(buffers, tiny.variables('v3')['buffers'])

  def test_after_their_borders_mtp_has_no_weight_and_biases_rest(self):
    at = lambda share: initial()._replace(sequences=share_of_run(share))
    early, _ = jitted()(at(0.2), batch())
    middle, _ = jitted()(at(0.3), batch())
    late, _ = jitted()(at(0.6), batch())
    # The norm before the head: no balance loss and no decay reach it.
    norm = lambda s: np.array(s.params['mtp'][0]['norm']['scale'])
    np.testing.assert_array_equal(norm(late), norm(initial()))
    self.assertGreater(np.abs(norm(middle) - norm(initial())).min(), 0)
    moved = lambda s: (
      not np.array_equal(
        s.buffers['segments'][0][0]['ffn']['router']['bias'],
        initial().buffers['segments'][0][0]['ffn']['router']['bias'],
      )
    )
    self.assertEqual([moved(s) for s in (early, middle, late)], [1, 0, 0])

  def test_no_gradient_and_no_decay_reach_the_biases(self):
    # Their rate is 0 by then, so nothing else may move them.
    state = initial()._replace(sequences=share_of_run(0.3))
    before = copied(state.buffers)
    state, _ = jitted()(state, batch())
    same(state.buffers, before)

  def test_stored_moments_are_those_of_the_clipped_gradient(self):
    clip, free = 1e-3, math.inf
    moments, norms = {}, {}
    for limit in (clip, free):
      optimizer = dataclasses.replace(SMOOTH, clip=limit)
      cfg = dataclasses.replace(RECIPE, optimizer=optimizer)
      step = jax.jit(train.train_step(tiny.model('step'), cfg))
      state, metrics = step(initial(), batch())
      norms[limit] = float(metrics['grad_norm'])
      leaves = jax.tree.leaves_with_path(state.moments)
      moments[limit] = {jax.tree_util.keystr(path): a for path, a in leaves}
    self.assertGreater(norms[clip], 10 * clip)
    share = clip / norms[free]
    for power, name in (1, '.mu'), (2, '.nu'):
      some = [path for path in moments[clip] if name in path]
      self.assertNotEmpty(some)
      for path in some:
        got = np.float64(moments[clip][path])
        want = share**power * np.float64(moments[free][path])
        np.testing.assert_allclose(
          got, want, rtol=3e-6, atol=1e-6 * np.abs(want).max(), err_msg=path
        )

  def test_a_step_counts_and_reports_its_rate(self):
    state, metrics = jitted()(initial(), batch())
    self.assertEqual((int(state.step), int(state.sequences)), (1, B))
    self.assertAlmostEqual(float(metrics['learning_rate']), 0.01, places=8)
    self.assertTrue(bool(metrics['applied']))
    self.assertEqual(int(metrics['skipped']), 0)
    self.assertTrue(
      all(a.dtype == jnp.float32 for a in jax.tree.leaves(state.params))
    )

  def test_the_loss_at_step_n_is_reproducible_bit_for_bit(self):
    def run():
      state, losses = initial(), []
      for i in range(6):
        state, metrics = jitted()(state, batch(i))
        losses.append(metrics['loss'].item())
      return losses, copied(state)

    (first, end), (second, again) = run(), run()
    self.assertEqual(first, second)
    same(end, again)

  def test_one_batch_is_learnt_by_heart(self):
    data, state = batch(), initial()
    # No two documents begin alike, so each next token can be known.
    first = (data['positions'] == 0) & (data['segments'] > 0)
    data['tokens'][first] = 1 + np.arange(first.sum())
    _, before = jitted()(initial(), data)
    for _ in range(250):
      # The schedules stand still: biases at rest, MTP at its full weight.
      state = state._replace(sequences=share_of_run(0.3))
      state, metrics = jitted()(state, data)
    self.assertGreater(float(before['loss']), 4)
    self.assertLess(float(metrics['loss']), 0.01)
    self.assertLess(float(metrics['mtp_loss']), 0.01)
    self.assertEqual(int(metrics['skipped']), 0)

  def test_bfloat16_trains_float32_weights_close_to_float32(self):
    cfg = ds.changed(tiny.config('llama'), {'compute.dtype': 'bfloat16'})
    low = dataclasses.replace(SMOOTH, moments='bfloat16')
    recipe = dataclasses.replace(RECIPE, optimizer=low)
    variables = jax.tree.map(jnp.array, tiny.variables('llama'))
    state = train.initial_state(ds.build(cfg), recipe, variables)
    state, metrics = jax.jit(train.train_step(ds.build(cfg), recipe))(
      state, tiny.together(batch())
    )
    want, seen = jitted(name='llama')(initial('llama'), tiny.together(batch()))
    # Activations carry 8 bits through two layers; the loss averages them.
    self.assertAlmostEqual(
      float(metrics['loss']), float(seen['loss']), delta=0.02
    )
    self.assertAlmostEqual(
      float(metrics['grad_norm'] / seen['grad_norm']), 1, delta=0.02
    )
    kinds = lambda t: {a.dtype.name for a in jax.tree.leaves(t) if a.ndim}
    self.assertEqual(kinds(state.params), {'float32'})
    self.assertEqual(kinds(state.moments), {'bfloat16'})
    start = jax.tree.leaves(tiny.variables('llama')['params'])
    moved = lambda s: np.concatenate(
      [np.ravel(a - b) for a, b in zip(jax.tree.leaves(s.params), start)]
    )
    self.assertGreater(np.corrcoef(moved(state), moved(want))[0, 1], 0.99)


BAD = 63  # a token whose embedding is not a number


def poisoned():
  state = initial()
  embed = state.params['embed'].at[BAD].set(jnp.nan)
  return state._replace(params={**state.params, 'embed': embed})


def data_with(bad, seed):
  data = batch(seed)
  tokens = np.where(data['tokens'] == BAD, 1, data['tokens'])
  if bad:
    tokens[0, 0] = BAD
  return {**data, 'tokens': tokens}


class GateTest(parameterized.TestCase):
  def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters(self):
    state, _ = jitted()(poisoned(), data_with(False, 0))
    before, streaks = copied(state), []
    for seed in range(3):
      state, metrics = jitted()(state, data_with(True, seed))
      self.assertFalse(np.isfinite(metrics['loss']))
      self.assertFalse(bool(metrics['applied']))
      streaks.append(int(metrics['streak']))
    self.assertEqual(streaks, [1, 2, 3])
    for field in ('params', 'buffers', 'moments'):
      same(copied(getattr(state, field)), getattr(before, field))
    same(copied(state.gate)[:3], before.gate[:3])
    self.assertEqual(int(state.step), 4)
    self.assertEqual(int(state.sequences), 4 * B)
    state, metrics = jitted()(state, data_with(False, 9))
    self.assertTrue(bool(metrics['applied']))
    self.assertEqual((int(metrics['streak']), int(metrics['skipped'])), (0, 3))
    head = np.asarray(state.params['head'])
    self.assertTrue(np.isfinite(head).all())
    self.assertGreater(np.abs(head - before.params['head']).max(), 0)

  def test_gradient_and_update_alone_are_kept_beside_the_state(self):
    cfg = ds.changed(
      tiny.config('dense_mtp'), {'vocab_size': 1 << 16, 'mtp.depth': 0}
    )
    model = ds.build(cfg)
    recipe = dataclasses.replace(RECIPE, batch=BatchConfig(1))
    fresh = lambda key: train.initial_state(model, recipe, model.init(key))
    state = jax.eval_shape(fresh, jax.random.key(0))
    data = {'tokens': jax.ShapeDtypeStruct((1, 9), np.int32)}
    step = jax.jit(train.train_step(model, recipe), donate_argnums=0)
    memory = step.lower(state, data).compile().memory_analysis()
    weights = sum(4 * a.size for a in jax.tree.leaves(state.params))
    # Three times the weights with moments that wait for the verdict.
    self.assertLess(memory.temp_size_in_bytes, 2.2 * weights)

  @parameterized.parameters(
    (OptimizerConfig(muon=MuonConfig()), ()),
    (OptimizerConfig(moments='bfloat16'), ()),
    (SMOOTH, ('head',)),
  )
  def test_a_refused_step_keeps_every_bit(self, optimizer, trainable):
    cfg = dataclasses.replace(RECIPE, optimizer=optimizer, trainable=trainable)
    model = tiny.model('step')
    step = jax.jit(train.train_step(model, cfg))
    variables = {'params': poisoned().params, 'buffers': initial().buffers}
    state = train.initial_state(model, cfg, variables)
    state, metrics = step(state, data_with(False, 0))
    self.assertTrue(bool(metrics['applied']))
    after, metrics = step(state, data_with(True, 1))
    self.assertFalse(bool(metrics['applied']))
    for field in ('params', 'buffers', 'moments'):
      same(copied(getattr(after, field)), copied(getattr(state, field)))
    again, metrics = step(after, data_with(False, 2))
    self.assertTrue(bool(metrics['applied']))
    moved = jax.tree.map(
      lambda a, b: bool((a != b).any()), again.moments, after.moments
    )
    self.assertTrue(any(jax.tree.leaves(moved)))

  def test_a_micro_batch_that_is_not_finite_skips_the_whole_update(self):
    before = copied(poisoned())
    state, metrics = jitted(8)(poisoned(), data_with(True, 0))
    self.assertFalse(bool(metrics['applied']))
    for field in ('params', 'buffers', 'moments'):
      same(copied(getattr(state, field)), getattr(before, field))

  def test_an_exploding_batch_changes_nothing_but_the_counters(self):
    # The run's loss has been near 0.1 for long; this batch has one above 4.
    state = initial()
    gate = state.gate._replace(
      mean=jnp.array([0.1, 1e3]),
      square=jnp.array([1e-4, 1.0]),
      accepted=jnp.int32(RECIPE.gate.warmup),
    )
    before = copied(state._replace(gate=gate))
    state, metrics = jitted()(state._replace(gate=gate), batch())
    self.assertGreater(float(metrics['loss']), 4)
    self.assertFalse(bool(metrics['applied']))
    for field in ('params', 'buffers', 'moments'):
      same(copied(getattr(state, field)), getattr(before, field))
    same(copied(state.gate)[:3], before.gate[:3])
    self.assertEqual(int(metrics['streak']), 1)

  @parameterized.parameters(-1.0, np.nan)
  def test_an_update_that_is_not_finite_changes_nothing(self, second):
    # The gradient is fine; the root of one damaged second moment is not.
    state = initial()
    clip, adam, *rest = state.moments
    nu = adam.nu | {'embed': adam.nu['embed'].at[3, 1].set(second)}
    damaged = (clip, adam._replace(nu=nu), *rest)
    before = copied(state._replace(moments=damaged))
    state, metrics = jitted()(state._replace(moments=damaged), batch())
    self.assertTrue(np.isfinite(metrics['grad_norm']))
    self.assertFalse(np.isfinite(metrics['update_norm']))
    self.assertFalse(bool(metrics['applied']))
    for field in ('params', 'buffers', 'moments'):
      same(copied(getattr(state, field)), getattr(before, field))
    same(copied(state.gate)[:3], before.gate[:3])
    self.assertEqual((int(state.gate.skipped), int(state.gate.streak)), (1, 1))

  def test_the_norm_of_the_update_is_that_of_what_is_added(self):
    before = copied(initial().params)
    state, metrics = jitted()(initial(), batch())
    added = jax.tree.map(np.subtract, copied(state.params), before)
    square = sum(
      np.square(a, dtype=float).sum() for a in jax.tree.leaves(added)
    )
    norm = np.sqrt(square) / float(metrics['learning_rate'])
    np.testing.assert_allclose(metrics['update_norm'], norm, rtol=1e-4)


class MuonTest(parameterized.TestCase):
  def test_a_part_that_stops_learning_does_not_end_the_run(self):
    """MTP's weight becomes 0; its momenta halve eightfold to nothing."""
    recipe = dataclasses.replace(
      RECIPE,
      mtp_weight=SwitchConfig(0.3, 0.0, 3 * B * T / RECIPE.tokens),
      optimizer=OptimizerConfig(muon=MuonConfig(momentum=0.125)),
    )
    model = ds.build(
      dataclasses.replace(tiny.config('dense_mtp'), mtp=MTPConfig(1, 'dense'))
    )
    step = jax.jit(train.train_step(model, recipe), donate_argnums=0)
    state = train.initial_state(model, recipe, tiny.draw(model))
    momenta = []
    for number in range(60):
      state, metrics = step(state, batch())
      self.assertTrue(bool(metrics['applied']), number)
      norms = metrics['block_norms']
      self.assertEqual(float(norms['mtp.0']) > 0, number < 3)
      merge = state.moments[1].first['mtp'][0]['merge']
      momenta.append(float(jnp.abs(merge).max()))
    # It went through all sizes: those whose squares underflow, and none.
    self.assertTrue(any(1e-30 < m < 1e-21 for m in momenta))
    self.assertLess(momenta[-1], 2.0**-126)


class GlobalBatchTest(parameterized.TestCase):
  def test_float8_experts_learn_from_a_batch_of_any_size(self):
    """The loss is a mean over V3's 15,360 sequences of 4,096 as over 2,048."""
    moe = MoEConfig(experts=4, top_k=2, width=128)
    config = dataclasses.replace(
      tiny.config('gqa'), dim=128, layout=((('moe',), 1),), moe=moe
    )
    models = {
      float8: ds.build(ds.changed(config, {'moe.float8': float8}))
      for float8 in (False, True)
    }
    variables = models[True].init(jax.random.key(0))
    # A trained stream has a size of about 1.
    variables['params']['embed'] *= 50
    data = tiny.together(tiny.documents(4, 17))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(float8, count):
      def loss(params):
        state = {**variables, 'params': params}
        shares = Shares(count, 1, jnp.float32(0))
        return train.loss_and_metrics(
          models[float8], state, data, shares, tiny.PRETRAINING
        )[0]

      ffn = jax.grad(loss)(variables['params'])['segments'][0][0]['ffn']
      return ffn['gate_up'], ffn['down']

    errors = {}
    for count in (2048.0, 62.9e6, 1e12):
      pairs = zip(gradients(True, count), gradients(False, count))
      errors[count] = [
        float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in pairs
      ]
      for error in errors[count]:
        self.assertBetween(error, 0.02, 0.09, f'{count:g} tokens')
    np.testing.assert_allclose(errors[62.9e6], errors[2048.0], rtol=0.02)


if __name__ == '__main__':
  absltest.main()
