"""LoRA: adapters on frozen weights, alone, on a mesh, merged and exported.

Float32; full rank equals full fine-tuning to 1e-5 of the greatest value.
"""

import dataclasses
import functools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.model import lora, matrices
from deepseek_jax.model.functional import functional
from deepseek_jax.pipeline import stages
from deepseek_jax.plan.device_shares import Mesh, shares
from deepseek_jax.plan.memory import Training, checkpoint_bytes, state_bytes
from deepseek_jax.plan.parameters import count_parameters
from deepseek_jax.train import warm_start
from tests import fake_devices, tiny

B, T = 4, 12
NAMES = ('segments', 'mtp', 'head')
DENSE = ('segments', 'head')
RECIPE = ds.TrainConfig(
  tokens=1e6,
  batch=ds.BatchConfig(B),
  # Smooth in the gradient; decay would pull b, not W, to zero.
  optimizer=ds.OptimizerConfig(eps=1e-3, decay=0.0),
  schedule=ds.ScheduleConfig('constant', peak=0.01, warmup=0),
  gate=ds.GateConfig(warmup=1000),
)


def config(name='step', names=NAMES, rank=3, alpha=2.0) -> ds.TransformerConfig:
  return dataclasses.replace(
    tiny.config(name), lora=ds.LoRAConfig(names, rank, alpha)
  )


@functools.cache
def model(name='step', **fields) -> ds.Model:
  return ds.build(config(name, **fields))


@functools.cache
def variables(name='step', **fields) -> dict:
  """Every leaf random, b too."""
  return tiny.draw(model(name, **fields))


def flat(tree) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.')
  return {name(path): np.asarray(leaf) for path, leaf in leaves}


def adapters(tree) -> set:
  return {name for name in flat(tree) if 'lora' in name.split('.')}


def trained(made: ds.Model, cfg: ds.TrainConfig, start: dict, steps=2):
  """The state after some steps."""
  state = ds.initial_state(made, cfg, jax.tree.map(jnp.array, start))
  step = jax.jit(ds.train_step(made, cfg))
  for seed in range(steps):
    state, _ = step(state, tiny.documents(B, T + 1, seed, 3))
  return state


class ForwardTest(parameterized.TestCase):
  def test_a_fresh_model_is_the_base_model_exactly(self):
    key, tokens = jax.random.key(3), tiny.tokens(2, T)
    base, fresh = tiny.model('step').init(key), model().init(key)
    chex.assert_trees_all_equal(lora.plain(fresh['params']), base['params'])
    chex.assert_trees_all_equal(fresh['buffers'], base['buffers'])
    want = jax.jit(tiny.model('step').apply)(base, tokens).logits
    got = jax.jit(model().apply)(fresh, tokens).logits
    np.testing.assert_array_equal(got, want)
    for name in adapters(fresh['params']):
      leaf = flat(fresh['params'])[name]
      self.assertEqual(leaf.any(), name.endswith('.a'), name)

  def test_a_is_drawn_with_variance_one_over_its_inputs(self):
    made = model(names=('head', 'ffn'), rank=400).init(jax.random.key(0))
    leaves = flat(made['params'])
    for name, n in (('lora.head', 16), ('segments.0.0.ffn.lora.down', 8)):
      a = leaves[f'{name}.a']
      self.assertAlmostEqual(float(a.var() * n), 1, delta=0.05)
    layers = leaves['segments.0.0.ffn.lora.down.a']
    self.assertGreater(np.abs(layers[0] - layers[1]).max(), 0.1)

  @parameterized.parameters(
    'v3_tiny', 'v32_tiny', 'v4_tiny', 'nsa_tiny', 'engram_tiny'
  )
  def test_products_are_matrix_products_of_every_matrix(self, preset):
    base = ds.build(getattr(ds.presets, preset)()).abstract['params']
    made = lora.adapters(base, ds.LoRAConfig(('segments',), rank=2))
    rng, seen = np.random.default_rng(0), 0
    for path, variable in lora._flat(base):
      if path not in made:
        continue
      one, axes = made[path], tuple(variable.get_metadata()['axes'])
      how, lead = matrices.split(axes), len(variable.shape) - len(axes)
      thin = [matrices.split(each) for each in one.axes]
      shape = tuple(min(n, 3) for n in variable.shape)  # every axis, but short
      small = lora.adapter(shape, axes, 2)
      a, b = (rng.normal(size=s) for s in (small.a, small.b))
      got = np.einsum(small.product, a, b)
      flat_of = lambda x, s, lead=lead: _matrices(x, s, lead)
      want = flat_of(a, thin[0]) @ flat_of(b, thin[1])
      np.testing.assert_allclose(flat_of(got, how), want, rtol=1e-12)
      self.assertEqual(got.shape, shape)
      seen += 1
    self.assertGreater(seen, 5)

  def test_merged_equals_adapted_and_samples_alike(self):
    tokens = tiny.tokens(2, T)
    made, given = model('gqa', names=DENSE), variables('gqa', names=DENSE)
    config, plain = ds.merged(made.config, given)
    self.assertIsNone(config.lora)
    self.assertEmpty(adapters(plain))
    got = jax.jit(ds.build(config).apply)(plain, tokens).logits
    want = jax.jit(made.apply)(given, tokens).logits
    np.testing.assert_allclose(got, want, atol=1e-6)
    base = lora.plain(given['params'])
    other = tiny.jitted('gqa')({**plain, 'params': base}, tokens).logits
    self.assertGreater(float(np.abs(other - want).max()), 0.1)
    rows = [
      ds.generate(m, v, tokens, max_new_tokens=3, temperature=0)
      for m, v in ((made, given), (ds.build(config), plain))
    ]
    self.assertEqual(*rows)

  def test_weights_are_rounded_once(self):
    low = dataclasses.replace(
      config('gqa', ('attention',)),
      compute=dataclasses.replace(tiny.config('gqa').compute, dtype='bfloat16'),
    )
    made, given = ds.build(low), tiny.draw(ds.build(low))
    _, exact = ds.merged(low, given)
    want = jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact['params'])
    got = made.cast(given)['params']
    picked = lambda tree: tree['segments'][0][0]['attention']
    chex.assert_trees_all_equal(picked(got), picked(want))
    # A pipeline casts first, and folds inside what it differentiates.
    stage = stages.cut(low, 2)[0].functional
    own = {k: stages.cut(low, 2)[0].take(t) for k, t in given.items()}
    module = stage.merge(stage.cast(own))
    _, params, _ = nnx.split(module, nnx.Param, ...)
    first = jax.tree.map(lambda p: p[:1], picked(want))
    chex.assert_trees_all_equal(picked(nnx.to_pure_dict(params)), first)
    twice = made.cast(made.cast(given))
    chex.assert_trees_all_equal(twice['params'], got)


def _matrices(x, how: matrices.Split, lead: int):
  """[matrices n m] of a parameter whose first `lead` axes are stacked."""
  at = lambda axes: [lead + i for i in axes]
  order = [
    *range(lead),
    *at(how.independent),
    *at(how.inputs),
    *at(how.outputs),
  ]
  x = x.transpose(order)
  own = lead + len(how.independent)
  inputs = own + len(how.inputs)
  size = lambda dims: int(np.prod(dims))
  return x.reshape(-1, size(x.shape[own:inputs]), size(x.shape[inputs:]))


class TrainingTest(parameterized.TestCase):
  def test_adapters_alone_move_and_have_moments(self):
    made, given = model('gqa', names=DENSE), variables('gqa', names=DENSE)
    state = trained(made, RECIPE, given)
    before, after = flat(given['params']), flat(state.params)
    thin = adapters(state.params)
    for name in before:
      moved = bool((before[name] != after[name]).any())
      self.assertEqual(moved, name in thin, name)
    moments = {n for n, leaf in flat(state.moments).items() if leaf.ndim}
    self.assertLen(moments, 2 * len(thin))
    self.assertEqual(moments, adapters(state.moments))

  def test_full_rank_equals_full_fine_tuning(self):
    # The matrices with D inputs: a, the identity, is frozen.
    names = ('attention.q', 'attention.k', 'attention.v', 'gate_up', 'head')
    full = model(names=names, rank=tiny.DIM, alpha=float(tiny.DIM))
    start = full.init(jax.random.key(0))
    base = tiny.variables('step')
    params = _with_identity(start['params'], base['params'])
    got = trained(
      full,
      dataclasses.replace(RECIPE, trainable=('b',)),
      {'params': params, 'buffers': base['buffers']},
      steps=3,
    )
    last = tuple(name.split('.')[-1] for name in names)
    want = trained(
      tiny.model('step'),
      dataclasses.replace(RECIPE, trainable=last),
      base,
      steps=3,
    )
    chex.assert_trees_all_equal(got.buffers, base['buffers'])
    _, plain = ds.merged(full.config, got._asdict())
    got, want, old = map(flat, (plain['params'], want.params, base['params']))
    self.assertEqual(set(got), set(want))
    for name in want:
      learned = name.split('.')[-1] in last
      self.assertEqual(bool((want[name] != old[name]).any()), learned, name)
      self.assertLess(tiny.relative(got[name], want[name]), 1e-5, name)
      if learned:
        moved = np.abs(want[name] - old[name]).max()
        self.assertLess(np.abs(got[name] - want[name]).max(), 1e-3 * moved)

  def check_spread(self, name, *axes):
    found = fake_devices.run('tests.model.lora_worker', name, *axes, devices=2)
    for axis in axes:
      with self.subTest(axis):
        self.assertGreater(found[axis].pop('moved'), 1e-3)
        self.assertEqual(found[axis].pop('begun'), 0)
        for name, value in found[axis].items():
          self.assertLess(value, 1e-5, name)

  @pytest.mark.slow
  def test_two_devices_and_two_stages_equal_one(self):
    self.check_spread('gqa', 'fsdp', 'stage')

  @pytest.mark.slow
  def test_experts_spread_over_two_devices_equal_one(self):
    self.check_spread('step', 'fsdp', 'expert', 'stage')

  def test_a_warm_start_keeps_weights_and_draws_adapters(self):
    fresh = model().init(jax.random.key(0))
    begun, new = warm_start.variables(fresh, tiny.variables('step'), 'runs/old')
    self.assertEqual(
      {f'params.{n}' for n in adapters(fresh['params'])}, set(new)
    )
    chex.assert_trees_all_equal(
      lora.plain(begun['params']), tiny.variables('step')['params']
    )


def _with_identity(made: dict, base: dict) -> dict:
  """The parameters with base's weights and a = identity, from D to rank."""
  out = {}
  for key, value in made.items():
    if key == 'lora':
      out[key] = {
        name: {'a': _identity(name, pair['a']), 'b': pair['b']}
        for name, pair in value.items()
      }
    else:
      inner = isinstance(value, dict)
      out[key] = _with_identity(value, base[key]) if inner else base[key]
  return out


def _identity(name: str, a) -> np.ndarray:
  one = np.eye(tiny.DIM, dtype=np.float32)
  if name == 'gate_up':  # [... D 2 r]
    one = np.repeat(one[:, None], 2, axis=1)
  return np.broadcast_to(one, a.shape).copy()


class ExportTest(parameterized.TestCase):
  def test_exported_tensors_are_the_merged_ones(self):
    config, plain = ds.merged(model('v3').config, variables('v3'))
    got = hf.saving.tensors(model('v3').config, variables('v3'))
    chex.assert_trees_all_equal(got, hf.saving.tensors(config, plain))
    folder = self.enterContext(tempfile.TemporaryDirectory())
    hf.save(folder, model('v3').config, variables('v3'))
    _, back = hf.load(folder, mtp=True)
    chex.assert_trees_all_equal(back, plain)

  def test_adapters_are_never_left_out_in_silence(self):
    with self.assertRaisesRegex(InputError, 'hold adapters'):
      hf.saving.tensors(tiny.config('v3'), variables('v3'))

  def test_the_planner_counts_adapters(self):
    got, base = map(count_parameters, (config('v3'), tiny.config('v3')))
    shapes = nnx.to_pure_dict(model('v3').abstract['params'])
    size = lambda tree: sum(
      int(np.prod(leaf.shape))
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      if any(getattr(entry, 'key', None) == 'lora' for entry in path)
    )
    self.assertEqual(got.mtp - base.mtp, size(shapes['mtp']))
    self.assertEqual(got.total - base.total, size(shapes) - size(shapes['mtp']))
    # Of 8 experts 3 work on a token: 2 layers, [D 2 F] and [F D], rank 3.
    thin = 3 * (2 * (16 + 8) + (8 + 16))
    idle = got.total - got.active - (base.total - base.active)
    self.assertEqual(idle, 2 * 5 * thin)
    thin = size(shapes)
    self.assertEqual(
      checkpoint_bytes(config('v3')),
      4 * (got.total + got.mtp + 2 * thin) + _integers('v3'),
    )
    held = [s for found in shares(config('v3'), Mesh()).values() for s in found]
    classes = state_bytes(config('v3'), held, Mesh(), Training())
    self.assertEqual(classes['gradients'], 4 * thin)
    self.assertEqual(classes['moments'], 8 * thin)
    self.assertEqual(classes['weights'], 4 * (got.total + got.mtp))


def _integers(name) -> int:
  """Bytes of buffers that are no parameters."""
  leaves = jax.tree.leaves(nnx.to_pure_dict(model(name).abstract['buffers']))
  whole = [a for a in leaves if not jnp.issubdtype(a.dtype, jnp.floating)]
  return sum(4 * int(np.prod(a.shape)) for a in whole)


class ConfigTest(parameterized.TestCase):
  def test_it_is_one_line_of_configuration(self):
    line = {'lora': ds.LoRAConfig(('attention', 'ffn.down'), 4, 8.0)}
    changed = ds.changed(tiny.config('v3'), line)
    self.assertEqual(
      ds.from_dict(ds.TransformerConfig, ds.to_dict(changed)), changed
    )
    self.assertEqual(changed.lora.scale, 2.0)
    adapted = {
      name.split('.lora.')[0].split('.')[-1] + '.' + name.split('.')[-2]
      for name in adapters(
        nnx.to_pure_dict(ds.build(changed).abstract['params'])
      )
    }
    self.assertIn('attention.q_up', adapted)
    self.assertIn('ffn.down', adapted)
    self.assertNotIn('ffn.gate_up', adapted)
    self.assertNotIn('shared.down', adapted)  # ffn.shared.down

  def test_a_config_from_before_lora_loads(self):
    old = ds.to_dict(tiny.config('v3'))
    del old['lora']
    self.assertIsNone(ds.from_dict(ds.TransformerConfig, old).lora)

  def test_equal_models_share_what_was_compiled(self):
    self.assertEqual(ds.build(config()), ds.build(config()))
    self.assertNotEqual(ds.build(config()), ds.build(config(rank=2)))
    self.assertNotEqual(ds.build(config()), tiny.model('step'))

  @parameterized.parameters(
    ({'rank': 0}, 'lora.rank = 0'),
    ({'rank': 2.0}, 'lora.rank = 2.0'),
    ({'alpha': 0.0}, 'lora.alpha = 0.0'),
    ({'alpha': float('nan')}, 'lora.alpha = nan'),
    ({'names': ()}, 'lora.names'),
    ({'names': 'attention'}, "lora.names = 'attention'"),
    ({'names': (3,)}, 'lora.names'),
    ({'names': ('atention',)}, "did you mean 'attention'"),
    ({'names': ('attention.q_pu',)}, "did you mean 'attention.q_up'"),
    ({'names': ('segments.0.0.attention.q_up',)}, 'segments.attention.q_up'),
    ({'names': ('tention',)}, "no parameter has 'tention'"),
    ({'names': ('attention', 'q_norm')}, 'no matrix'),
    ({'names': ('lora',)}, "no parameter has 'lora'"),
    ({'names': ('zzz',)}, 'use one of'),
  )
  def test_a_bad_field_is_named(self, fields, message):
    with self.assertRaisesRegex(InputError, message):
      ds.build(config('v3', **fields))

  def test_a_dict_is_no_lora_config(self):
    with self.assertRaisesRegex(InputError, 'lora = .*must be a LoRAConfig'):
      dataclasses.replace(tiny.config('v3'), lora={'rank': 2})

  def test_a_stage_cannot_adapt_the_embedding(self):
    with self.assertRaisesRegex(InputError, 'mesh.stage = 2.*embed'):
      stages.cut(config('step', ('embed',)), 2)


class FunctionalTest(absltest.TestCase):
  def test_without_lora_nothing_is_in_between(self):
    made = functional(
      lambda key: ds.model.network.Transformer(
        tiny.config('gqa'), rngs=nnx.Rngs(key)
      ),
      jnp.float32,
    )
    self.assertIs(made.ready, made.cast)


if __name__ == '__main__':
  absltest.main()
