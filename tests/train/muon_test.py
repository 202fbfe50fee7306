"""Muon against V4's algorithm 1 in float64 NumPy, and where optax differs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import Kind
from deepseek_jax.train import muon
from deepseek_jax.train import optimizer as optim
from deepseek_jax.train.muon import MuonConfig
from tests import tiny

RATE = 0.01
CFG = optim.OptimizerConfig(eps=1e-20, clip=1e9, muon=MuonConfig())


def newton_schulz(a, rounds=8, settling=2):
  """Float64, one matrix at a time, in the shape in which it is wide."""
  x = a / np.linalg.norm(a)
  x = x.T if x.shape[0] > x.shape[1] else x
  for i in range(rounds + settling):
    a1, b1, c1 = (3.4445, -4.775, 2.0315) if i < rounds else (2, -1.5, 0.5)
    g = x @ x.T
    x = a1 * x + b1 * g @ x + c1 * g @ g @ x
  return x.T if a.shape[0] > a.shape[1] else x


def step(w, m, g):
  """V4's algorithm 1 for one matrix -> (w, m)."""
  m = 0.95 * m + g
  o = newton_schulz(0.95 * m + g)
  return w * (1 - RATE * 0.1) - RATE * o * max(w.shape) ** 0.5 * 0.18, m


@functools.cache
def model():
  """Experts, hyper-connections and MTP; two stacked layers of one kind."""
  config = dataclasses.replace(
    tiny.config('step'), residual=HyperConnectionsConfig(streams=2)
  )
  return ds.build(config)


def flat(tree, is_leaf=None):
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='.')
  return {name(path): leaf for path, leaf in leaves}


def run(cfg, params, steps, abstract):
  rule = optim.update_rule(cfg, abstract)

  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def update(grads, state, params):
    updates, state = rule.update(grads, state, params)
    return jax.tree.map(lambda p, u: p + RATE * u, params, updates), state

  state, every = rule.init(params), []
  for seed in range(steps):
    grads = tiny.fill(params, 50 + seed)
    every.append(grads)
    params, state = update(grads, state, params)
  return params, state, every


@functools.cache
def trained():
  params = tiny.draw(model())['params']
  after, state, grads = run(CFG, params, 3, model().abstract['params'])
  return params, after, state, grads


def spectrum(x):
  return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


class NewtonSchulzTest(parameterized.TestCase):
  @parameterized.parameters((6, 9), (9, 6), (7, 7), (1, 5))
  def test_equals_float64_and_is_orthogonal(self, n, m):
    x = np.random.default_rng(0).normal(size=(3, n, m))
    got = muon.newton_schulz(jnp.float32(x))
    for a, o in zip(x, got):
      np.testing.assert_allclose(o, newton_schulz(a), atol=2e-4)
      np.testing.assert_allclose(spectrum(o), 1, atol=2e-3)

  def test_eight_rounds_would_leave_the_spectrum_wide(self):
    x = np.diag(np.geomspace(1, 1e-2, 8))
    self.assertGreater(spectrum(newton_schulz(x)).min(), 0.999)
    self.assertLess(spectrum(newton_schulz(x)).max(), 1.001)
    self.assertGreater(spectrum(newton_schulz(x, 8, 0)).max(), 1.1)

  @parameterized.parameters((5, 0), (1, 0), (3, 4), (8, 2))
  def test_rounds_are_as_many_as_are_asked_for(self, rounds, settling):
    cfg = MuonConfig(rounds=rounds, settling=settling)
    x = np.random.default_rng(0).normal(size=(2, 6, 9))
    split = muon.split(('embed', 'mlp'))
    got = muon.orthogonal(jnp.float32(x), split, cfg)
    want = [3 * newton_schulz(a, rounds, settling) for a in x]
    np.testing.assert_allclose(got, want, atol=1e-4)

  @parameterized.parameters(({'rounds': 0},), ({'settling': -1},))
  def test_rounds_that_are_none_are_refused(self, fields):
    with self.assertRaisesRegex(ds.InputError, f'muon.{next(iter(fields))}'):
      MuonConfig(**fields)

  def test_zeros_stay_zeros(self):
    np.testing.assert_array_equal(muon.newton_schulz(jnp.zeros((2, 3, 4))), 0)

  def test_a_direction_has_no_scale(self):
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1, (3, 6, 9)) * rng.choice([-1, 1], (3, 6, 9))
    x = np.float32(x)
    op = jax.jit(muon.newton_schulz)
    want = op(x)
    for k in (*range(-120, 125, 10), -125, 125):
      # Matrices of one parameter have sizes of their own.
      s = np.float32(2.0) ** np.array([k, 0, -k])[:, None, None]
      np.testing.assert_array_equal(op(x * np.float32(s)), want, err_msg=str(k))
    for s in (1e-37, 3e-21, 0.7, 1e19, 3e38):
      np.testing.assert_allclose(op(x * np.float32(s)), want, atol=2e-5)

  def test_what_float32_does_not_hold_makes_no_direction(self):
    x = np.full((2, 3, 4), 1e-40, np.float32)
    np.testing.assert_array_equal(muon.newton_schulz(x), 0)
    x[0, 0, 0] = 2.0**-126  # the least that counts, and all that does
    got = np.asarray(muon.newton_schulz(x))
    self.assertTrue(np.isfinite(got).all())
    np.testing.assert_allclose(got[0, 0, 0], 1, atol=2e-3)
    np.testing.assert_array_equal(got[1], 0)
    x[0, 0, 0] = np.inf  # is the gate's to find
    self.assertFalse(np.isfinite(np.asarray(muon.newton_schulz(x))[0]).all())


class SplitTest(parameterized.TestCase):
  @parameterized.parameters(
    (('embed', 'heads', None), (), (0,), (1, 2)),
    (('heads', None, 'embed'), (), (0, 1), (2,)),
    (('experts', 'embed', None, 'mlp'), (0, 2), (1,), (3,)),
    (('experts', 'mlp', 'embed'), (0,), (1,), (2,)),
    (('embed', None, 'mlp'), (1,), (0,), (2,)),
    ((None, 'embed', None), (), (0, 1), (2,)),  # mHC's fn
    (('q_latent', 'heads', None), (), (0,), (1, 2)),
    (('embed', 'series', None), (1,), (0,), (2,)),
    ((None, 'groups', None), (1,), (0,), (2,)),
    (('embed', None), (), (0,), (1,)),
    ((None, 'streams', 'embed'), (1,), (0,), (2,)),  # Engram's keys
    (('embed', 'branches', 'kv_heads', None), (1,), (0,), (2, 3)),  # NSA's
    ((None, 'width', None), (), (0, 1), (2,)),  # its compressor, up
    ((None, 'width'), (), (0,), (1,)),  # and down
  )
  def test_axes_are_independent_inputs_or_outputs(self, axes, *want):
    self.assertEqual(muon.split(axes), tuple(want))

  @parameterized.parameters(
    ('vocab', 'embed'), ('embed', 'vocab'), (None,), (None, None), ('heads',)
  )
  def test_the_rest_is_adamws(self, *axes):
    self.assertIsNone(muon.split(axes))

  def test_every_kind_of_parameter_has_its_rule(self):
    how = flat(
      muon.splits(model().abstract['params']),
      is_leaf=lambda s: s is None or isinstance(s, muon.Split),
    )
    adam = {n.rsplit('.', 1)[-1] for n, s in how.items() if s is None}
    mine = {n.rsplit('.', 1)[-1] for n, s in how.items() if s is not None}
    self.assertEqual(adam, {'embed', 'head', 'scale', 'base'})
    self.assertContainsSubset(
      {'fn', 'weight', 'gate_up', 'down', 'q', 'out', 'merge'}, mine
    )

  def test_what_memories_and_branches_share_an_array_is_taken_apart(self):
    model = ds.build(
      dataclasses.replace(
        ds.presets.nsa_tiny(),
        layout=((('memory',), 1),),
        kinds={'memory': Kind('ffn', engram=True)},
        residual=HyperConnectionsConfig(streams=2),
        engram=EngramConfig(base=11, heads=2, dim=4),
        mtp=MTPConfig(depth=0),
      )
    )
    how = muon.splits(model.abstract['params'])['segments'][0][0]
    attention, memory = how['attention'], how['engram']
    independent = {
      'key': (memory['key'], (1,)),
      'value': (memory['value'], ()),
      'k': (attention['k'], (1,)),
      'v': (attention['v'], (1,)),
      'up': (attention['compress_k']['up'], ()),
      'down': (attention['compress_v']['down'], ()),
    }
    for name, (got, want) in independent.items():
      self.assertEqual(got.independent, want, name)
    for rest in (memory['table'], memory['conv'], memory['key_norm']):
      self.assertIsNone(rest)
    self.assertIsNone(attention['compress_k']['place'])


class UpdateTest(parameterized.TestCase):
  def by_hand(self, name, pick):
    """A matrix of a leaf through three steps; `pick` takes it as [n m]."""
    params, after, _, grads = trained()
    w = pick(np.float64(flat(params)[name]))
    m = np.zeros_like(w)
    for g in grads:
      w, m = step(w, m, pick(np.float64(flat(g)[name])))
    got = pick(np.float64(flat(after)[name]))
    # Newton-Schulz in float32 under eight rounds that stretch errors.
    np.testing.assert_allclose(got, w, atol=3e-6, err_msg=name)

  def test_each_expert_gate_and_up_are_matrices_of_their_own(self):
    name = 'segments.0.0.ffn.gate_up'
    for layer, expert, half in ((0, 0, 0), (1, 7, 1)):
      at = (layer, expert)
      self.by_hand(name, lambda a, at=at, h=half: a[at][:, h])
    name = 'segments.0.0.ffn.down'
    self.by_hand(name, lambda a: a[1, 3])

  def test_axes_are_merged_to_inputs_and_outputs(self):
    at = 'segments.0.0.'
    two = lambda a: a[1].reshape(a.shape[1], -1)
    self.by_hand(at + 'attention.q', two)
    rows = lambda a: a[0].reshape(-1, a.shape[-1])
    self.by_hand(at + 'attention.out', rows)
    self.by_hand(at + 'ffn_residual.fn', rows)
    self.by_hand('mtp.0.merge', lambda a: a)

  def test_decay_is_chosen_and_updates_have_a_root_mean_square_of_018(self):
    params = tiny.draw(model())['params']
    cfg = dataclasses.replace(CFG, muon=MuonConfig(decay=0.0, vectors=False))
    after, _, grads = run(cfg, params, 1, model().abstract['params'])
    moved = jax.tree.map(lambda a, b: (a - b) / RATE, flat(after), flat(params))
    one = np.asarray(moved['segments.0.0.ffn.gate_up'][0, 2, :, 1])
    np.testing.assert_allclose(np.sqrt((one**2).mean()), 0.18, rtol=1e-2)
    g = flat(grads[0])
    sign = -np.sign(g['norm.scale'])  # AdamW's first step, without decay
    np.testing.assert_allclose(moved['norm.scale'], sign, atol=1e-3)
    want = -np.sign(g['embed']) - 0.1 * flat(params)['embed']
    np.testing.assert_allclose(moved['embed'], want, atol=1e-3)

  def test_the_rest_moves_by_adamw(self):
    params, after, _, grads = trained()
    for name in ('embed', 'norm.scale', 'residual.base', 'head'):
      w = np.float64(flat(params)[name])
      m, v = np.zeros_like(w), np.zeros_like(w)
      for t, g in enumerate(grads, start=1):
        g = np.float64(flat(g)[name])
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        move = m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.95**t))
        w = w - RATE * (move + 0.1 * w)
      np.testing.assert_allclose(flat(after)[name], w, atol=1e-6, err_msg=name)

  def test_no_gradient_makes_no_direction(self):
    how = {'a': muon.split(('embed', None)), 'b': None}
    params = {'a': jnp.ones((2, 3, 4)), 'b': jnp.ones(3)}
    rule = muon.scale_by_muon(MuonConfig(), (0.9, 0.95, 1e-20), how)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.update(zeros, rule.init(params))
    jax.tree.map(np.testing.assert_array_equal, updates, zeros)

  @parameterized.parameters('float32', 'bfloat16')
  def test_a_momentum_decays_to_nothing_in_peace(self, dtype):
    """A part without a gradient, such as MTP whose weight has become 0."""
    how = {'a': muon.split(('embed', None))}
    params = {'a': jnp.ones((2, 6, 9))}
    rule = optim.stored_in(
      jnp.dtype(dtype),
      muon.scale_by_muon(MuonConfig(momentum=0.5), (0.9, 0.95, 1e-20), how),
    )
    update = jax.jit(rule.update)
    grads, state = tiny.fill(params, 1), rule.init(params)
    for step in range(170):
      updates, state = update(grads, state)
      self.assertTrue(bool(jnp.isfinite(updates['a']).all()), step)
      grads = {'a': jnp.zeros((2, 6, 9))}
    np.testing.assert_array_equal(updates['a'], 0)

  @pytest.mark.slow
  def test_moments_may_be_bfloat16(self):
    cfg = dataclasses.replace(CFG, moments='bfloat16')
    params, after, _, _ = trained()
    got, state, _ = run(cfg, params, 3, model().abstract['params'])
    kinds = {a.dtype for a in jax.tree.leaves(state)} - {jnp.dtype('int32')}
    self.assertEqual(kinds, {jnp.dtype('bfloat16')})
    moved = flat(after)['mtp.0.merge'] - flat(params)['mtp.0.merge']
    other = flat(got)['mtp.0.merge'] - flat(params)['mtp.0.merge']
    self.assertLess(tiny.relative(other, moved), 0.1)

  def test_a_momentum_of_1_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, r'muon.momentum = 1\.0: must'):
      MuonConfig(momentum=1.0)


class OptaxTest(parameterized.TestCase):
  """Six ways in which optax.contrib.muon is another algorithm."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.w = {'a': jnp.float32(rng.normal(size=(6, 24)))}
    self.g = [{'a': jnp.float32(rng.normal(size=(6, 24)))} for _ in range(2)]

  def theirs(self, steps=1, **kwargs):
    rule = optax.contrib.muon(1.0, **kwargs)
    state = rule.init(self.w)
    for g in self.g[:steps]:
      updates, state = rule.update(g, state, self.w)
    return -np.asarray(updates['a'])

  def ours(self, steps=1):
    m = np.zeros((6, 24))
    for g in self.g[:steps]:
      m = 0.95 * m + np.float64(g['a'])
    o = newton_schulz(0.95 * m + np.float64(self.g[steps - 1]['a']))
    return o * 24**0.5 * 0.18

  def test_1_its_coefficients_and_2_its_shape_factor(self):
    spread = spectrum(self.theirs())
    self.assertGreater(spread.max() / spread.min(), 1.05)
    spread = spectrum(self.ours())
    self.assertLess(spread.max() / spread.min(), 1.002)
    rms = lambda a: np.sqrt((a**2).mean())
    self.assertGreater(rms(self.theirs()) / 0.18, 1.5)
    np.testing.assert_allclose(rms(self.ours()), 0.18, rtol=1e-3)
    told = {
      'ns_coeffs': MuonConfig().coefficients(),
      'ns_steps': 10,
      'consistent_rms': 0.18,
    }
    # The first step's direction is the gradient's in both.
    np.testing.assert_allclose(self.theirs(**told), self.ours(), atol=1e-4)

  def test_3_which_parameters(self):
    abstract = model().abstract['params']
    how = muon.splits(abstract)
    self.assertIsNone(how['embed'])
    self.assertIsNotNone(how['segments'][0][0]['ffn']['gate_up'])
    params = {'embed': jnp.ones((6, 4)), 'experts': jnp.ones((3, 6, 4))}
    state = optax.contrib.muon(1.0).init(params)
    shapes = lambda t: {a.shape for a in jax.tree.leaves(t)}
    by_kind = state.inner_states
    self.assertIn((6, 4), shapes(by_kind['muon']))  # the embedding too
    self.assertNotIn((3, 6, 4), shapes(by_kind['muon']))

  def test_4_its_momentum_counts_less_at_first(self):
    told = {
      'ns_coeffs': MuonConfig().coefficients(),
      'ns_steps': 10,
      'consistent_rms': 0.18,
    }
    apart = np.abs(self.theirs(2, **told) - self.ours(2)).max()
    self.assertGreater(apart, 1e-2)

  def test_5_its_adamw_is_nadam(self):
    params = {'norm': jnp.ones(3)}
    grads = [{'norm': jnp.array([1.0, 2, 3])}, {'norm': jnp.ones(3)}]
    rule, out = optax.contrib.muon(1.0), None
    state = rule.init(params)
    for g in grads:
      out, state = rule.update(g, state, params)
    m = 0.9 * 0.1 * np.array([1.0, 2, 3]) + 0.1
    v = 0.999 * 0.001 * np.array([1.0, 4, 9]) + 0.001
    adam = m / (1 - 0.9**2) / np.sqrt(v / (1 - 0.999**2))
    self.assertGreater(np.abs(-out['norm'] - adam).max(), 1e-2)

  def test_6_it_works_in_the_gradients_dtype(self):
    x = self.g[0]['a'].astype(jnp.bfloat16)
    self.assertEqual(muon.newton_schulz(x).dtype, jnp.float32)
    w = {'a': self.w['a'].astype(jnp.bfloat16)}
    rule = optax.contrib.muon(1.0)
    updates, _ = rule.update({'a': x}, rule.init(w), w)
    self.assertEqual(updates['a'].dtype, jnp.bfloat16)


if __name__ == '__main__':
  absltest.main()
