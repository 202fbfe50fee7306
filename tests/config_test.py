"""Configurations survive dicts and JSON; a wrong field is named."""

import dataclasses
import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import config as configs
from deepseek_jax import recipes
from deepseek_jax.config_changes import with_defaults
from deepseek_jax.data import DataConfig
from deepseek_jax.infer.sampling import SampleConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.experts.capacity import CapacityConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.transformer_config import Kind, TransformerConfig
from deepseek_jax.parallel.sharding import param
from deepseek_jax.run.config import EvaluateConfig, RunConfig
from deepseek_jax.train import schedules
from deepseek_jax.train.step import TrainConfig

PRESETS = (
  'moe_16b',
  'v2_lite',
  'v2',
  'v3',
  'v3_tiny',
  'v32',
  'v32_tiny',
  'v4_flash',
  'v4_pro',
  'v4_tiny',
  'engram_tiny',
  'nsa_tiny',
  'llama31_8b',
  'llama31_70b',
  'llama31_405b',
)


def edited(path, value):
  """v3_tiny as a dict with one field set (or removed, for ...)."""
  values = ds.to_dict(ds.presets.v3_tiny())
  *parents, last = path.split('.')
  node = values
  for key in parents:
    node = node[key]
  if value is ...:
    del node[last]
  else:
    node[last] = value
  return values


class RoundTripTest(parameterized.TestCase):
  @parameterized.parameters(*PRESETS)
  def test_every_preset(self, name):
    config = getattr(ds.presets, name)()
    values = ds.to_dict(config)
    self.assertEqual(ds.from_dict(TransformerConfig, values), config)
    text = json.loads(json.dumps(values))
    again = ds.from_dict(TransformerConfig, text)
    self.assertEqual(again, config)
    self.assertEqual(again.segments(), config.segments())

  def test_no_preset_is_left_out(self):
    made = {
      name
      for name, value in vars(ds.presets).items()
      if callable(value)
      and getattr(value, '__module__', '') == 'deepseek_jax.presets'
      and not name.startswith('_')
      and name not in ('layout', 'v4_kinds')
    }
    self.assertEqual(made, set(PRESETS))

  @parameterized.parameters(
    TrainConfig(1e6, schedules.BatchConfig(8)),
    SampleConfig(0.7, 5, 0.9, (1, 2)),
    ds.changed(
      ds.presets.v3_tiny(),
      {
        'moe.capacity': CapacityConfig(1.5, 4, 0.2),
        'kinds.moe': Kind('moe', (('moe.top_k', 2),)),
        'compute.remat': 'dots',
      },
    ),
  )
  def test_other_trees(self, config):
    text = json.loads(json.dumps(ds.to_dict(config)))
    self.assertEqual(ds.from_dict(type(config), text), config)

  def test_an_int_where_a_float_belongs_becomes_one(self):
    config = ds.from_dict(TransformerConfig, edited('init_std', 1))
    self.assertIs(type(config.init_std), float)

  def test_attentions_are_told_apart_by_kind(self):
    values = ds.to_dict(ds.presets.llama31_8b())
    self.assertEqual(values['attention']['kind'], 'gqa')
    self.assertEqual(ds.to_dict(ds.presets.v3())['attention']['kind'], 'mla')
    self.assertEqual(values['attention']['rope']['scaling']['kind'], 'llama3')


@dataclasses.dataclass(frozen=True)
class MeanConfig:
  """A user's own attention: the mean of all tokens up to one."""

  width: int
  mean_scale: float = 1.0

  def cache(self, batch, slots, dtype):
    return jnp.zeros((batch, slots), dtype)

  def build(self, dim, *, std, rngs):
    return Mean(self, dim, std=std, rngs=rngs)


class Mean(nnx.Module):
  def __init__(self, cfg, dim, *, std, rngs):
    self.cfg = cfg
    init = nnx.initializers.normal(std)
    self.up = param(rngs, init, (dim, cfg.width), ('embed', None))
    self.down = param(rngs, init, (cfg.width, dim), (None, 'embed'))

  def __call__(self, x, ctx, past=None):
    count = jnp.arange(1, x.shape[1] + 1)[None, :, None]
    y = jnp.cumsum(x @ self.up[...], axis=1) / count * self.cfg.mean_scale
    return y @ self.down[...], past, {}


@dataclasses.dataclass(frozen=True)
class HalfConfig:
  """Has no cache, so it is no attention."""

  def build(self, dim, *, std, rngs):
    raise NotImplementedError


class OwnClassTest(parameterized.TestCase):
  def test_it_is_taken_builds_and_comes_back_from_json(self):
    config = ds.changed(
      ds.presets.v3_tiny(),
      {'attention': MeanConfig(8), 'attention.mean_scale': 2.0, 'dim': 64},
    )
    self.assertEqual(config.attention, MeanConfig(8, 2.0))
    text = json.loads(json.dumps(ds.to_dict(config)))
    self.assertEqual(text['attention']['kind'], f'{__name__}:MeanConfig')
    self.assertEqual(ds.from_dict(TransformerConfig, text), config)
    model = ds.build(config)
    out = jax.eval_shape(
      lambda key: model.apply(model.init(key), jnp.ones((1, 4), jnp.int32)),
      jax.random.key(0),
    )
    self.assertEqual(out.logits.shape, (1, 4, config.vocab_size))

  def test_in_a_kind_too(self):
    kind = Kind('moe', (('attention', MeanConfig(8)),))
    config = ds.changed(ds.presets.v3_tiny(), {'kinds.moe': kind})
    self.assertEqual(config.block('moe').attention, MeanConfig(8))
    text = json.loads(json.dumps(ds.to_dict(config)))
    self.assertEqual(ds.from_dict(TransformerConfig, text), config)

  def test_a_part_of_ours_in_a_kind_comes_back_too(self):
    kind = Kind('moe', (('attention', GQAConfig(4, 2, 8)),))
    config = ds.changed(ds.presets.v3_tiny(), {'kinds.moe': kind})
    text = json.loads(json.dumps(ds.to_dict(config)))
    self.assertEqual(ds.from_dict(TransformerConfig, text), config)

  @parameterized.parameters(
    ({'attention': HalfConfig()}, 'is HalfConfig, must be MLAConfig or'),
    ({'attention': MeanConfig}, 'is type, must be MLAConfig or'),
    ({'moe.router': MeanConfig(8)}, 'is MeanConfig, must be RouterConfig'),
    ({'attention': {'kind': 'nowhere:X'}}, 'import nowhere before'),
    ({'attention': {'kind': 'os:getcwd'}}, 'no such dataclass is imported'),
    ({'attention': {'kind': f'{__name__}:HalfConfig'}}, 'is HalfConfig, must'),
    ({'attention': {'kind': f'{__name__}:MeanConfig'}}, 'width: missing'),
    (
      {'attention': {'kind': f'{__name__}:MeanConfig', 'width': 'x'}},
      "width = 'x': is str",
    ),
  )
  def test_what_does_not_fit_is_named(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      ds.changed(ds.presets.v3_tiny(), changes)

  def test_a_file_decides_on_no_code(self):
    self.assertNotIn('this', sys.modules)
    with self.assertRaisesRegex(ds.InputError, 'import this before'):
      ds.changed(
        ds.presets.v3_tiny(), {'attention': {'kind': 'this:X', 'width': 8}}
      )
    self.assertNotIn('this', sys.modules)


class KeyTest(parameterized.TestCase):
  @parameterized.parameters('v3_tiny', 'v4_tiny', 'engram_tiny', 'nsa_tiny')
  def test_equal_configurations_have_one_key(self, name):
    one, other = getattr(ds.presets, name)(), getattr(ds.presets, name)()
    kinds = dict(reversed(other.kinds.items()))
    other = dataclasses.replace(other, kinds=kinds)
    self.assertEqual(configs.key(one), configs.key(other))
    self.assertEqual(hash(configs.key(one)), hash(configs.key(other)))
    self.assertEqual(ds.build(one), ds.build(other))

  @parameterized.parameters(
    ('norm_eps', 1e-5),
    ('tied', True),
    ('moe.router.scale', 2.0),
    ('kinds.moe', Kind('ffn')),
    ('mtp.depth', 0),
    ('attention', MeanConfig(8)),
    ('compute.dtype', 'bfloat16'),
  )
  def test_others_have_another(self, path, value):
    one = ds.presets.v3_tiny()
    other = ds.changed(one, {path: value})
    self.assertNotEqual(configs.key(one), configs.key(other))
    self.assertNotEqual(ds.build(one), ds.build(other))

  def test_numbers_of_other_types_and_other_functions_too(self):
    self.assertNotEqual(configs.key((1, 0)), configs.key((1.0, False)))
    model = ds.build(ds.presets.v3_tiny())
    mine = dataclasses.replace(model, apply=lambda *a: model.apply(*a))
    self.assertNotEqual(mine, model)
    self.assertEqual(mine, dataclasses.replace(mine))


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      'vocab_sise',
      1,
      r'^vocab_sise: no such field in TransformerConfig; did you mean'
      r' vocab_size\?$',
    ),
    (
      'moe.router.scorin',
      'softmax',
      r'^moe\.router\.scorin: no such field in RouterConfig; did you mean'
      r' moe\.router\.scoring\?$',
    ),
    ('moe.zzz', 1, r"^moe\.zzz: no such field in MoEConfig; fields: \['exp"),
    ('dim', '256', r"^dim = '256': is str, must be int$"),
    ('dim', 2.5, r'^dim = 2\.5: is float, must be int$'),
    ('dim', True, r'^dim = True: is bool, must be int$'),
    ('tied', 1, r'^tied = 1: is int, must be bool$'),
    ('init_std', 'x', r"^init_std = 'x': is str, must be float$"),
    ('dim', None, r'^dim = None: is NoneType, must be int$'),
    (
      'moe.router.scoring',
      'softmaxx',
      r"^moe\.router\.scoring = 'softmaxx': must be one of \['softmax',"
      r" 'sigmoid', 'sqrtsoftplus'\]$",
    ),
    (
      'attention.kind',
      'mha',
      r"^attention\.kind = 'mha': must be one of \['mla', 'gqa', 'dsa',"
      r" 'sharedkv', 'nsa'\]$",
    ),
    ('attention.heads', 0, r'^attention: heads = 0: must be at least 1$'),
    (
      'attention.heads',
      ...,
      r'^attention\.heads: missing; MLAConfig needs it$',
    ),
    ('moe.top_k', 17, r'^moe: top_k = 17: must lie in 1\.\.experts = 16$'),
    (
      'moe.router.groups',
      5,
      r'^moe: router\.groups = 5: must divide experts = 16$',
    ),
    ('ffn', 7, r'^ffn = 7: is int, must be FFNConfig or NoneType$'),
    (
      'kinds',
      {'dense': {'fnn': 'ffn'}},
      r'^kinds\.dense\.fnn: no such field in Kind; did you mean'
      r' kinds\.dense\.ffn\?$',
    ),
  )
  def test_a_wrong_field_is_named_with_the_fix(self, path, value, message):
    with self.assertRaisesRegex(ds.InputError, message):
      ds.from_dict(TransformerConfig, edited(path, value))

  @parameterized.parameters(
    ('moe.router', 'scoring', 'sgmoid'),
    ('moe.router', 'group_score', 'best'),
    ('attention', 'stage', 'warm'),
    ('compute', 'remat', 'half'),
    ('compute', 'dtype', 'float16'),
    ('kinds.dense', 'ffn', 'swiglu'),
  )
  def test_a_misspelt_choice_is_refused_from_python_too(self, at, name, value):
    config, parts = ds.presets.v32_tiny(), at.split('.')
    part = getattr(config, parts[0])
    if at == 'kinds.dense':
      wrong = {**part, 'dense': dataclasses.replace(part['dense'], ffn=value)}
    elif at == 'moe.router':
      router = dataclasses.replace(part.router, **{name: value})
      wrong = dataclasses.replace(part, router=router)
    else:
      wrong = dataclasses.replace(part, **{name: value})
    message = rf'^{at}\.{name} = {value!r}: must be one of \['
    with self.assertRaisesRegex(ds.InputError, message):
      dataclasses.replace(config, **{parts[0]: wrong})

  def test_a_misspelt_choice_of_a_kinds_part_is_refused(self):
    config = ds.presets.v4_tiny()
    wrong = dataclasses.replace(config.attention, compress='CSA')
    kinds = {**config.kinds, 'csa': Kind('moe', (('attention', wrong),))}
    with self.assertRaisesRegex(ds.InputError, "compress = 'CSA': must be one"):
      dataclasses.replace(config, kinds=kinds)

  def test_none_is_taken_where_it_means_something(self):
    config = ds.from_dict(TransformerConfig, edited('attention.q_rank', None))
    self.assertIsNone(config.attention.q_rank)


class EarlierTest(parameterized.TestCase):
  """Checks that what was written before a field existed goes on."""

  @parameterized.parameters(
    ('model', 'compute', 'cache'),
    ('model', 'compute'),
    ('model', 'residual'),  # a kind
    ('model', 'moe', 'router', 'scoring'),
    ('mesh',),
    ('rollouts',),
  )
  def test_a_field_that_is_absent_has_its_default(self, *path):
    run = recipes.v3_tiny()
    now = json.loads(json.dumps(configs.to_dict(run)))
    then = json.loads(json.dumps(now))
    *above, last = path
    functools.reduce(dict.__getitem__, above, then).pop(last)
    self.assertNotEqual(then, now)
    # Also where dataclasses lie in dicts and lists.
    found = with_defaults({'runs': [then]}, {'runs': [run]})
    self.assertEqual(found, {'runs': [now]})

  def test_nothing_else_becomes_equal(self):
    run = recipes.v3_tiny()
    other = ds.changed(run, {'model.compute.cache': 'compute', 'seed': 3})
    then = json.loads(json.dumps(configs.to_dict(run)))
    del then['model']['compute']['cache']
    now = json.loads(json.dumps(configs.to_dict(other)))
    found = with_defaults(then, other)
    self.assertEqual(found['model']['compute']['cache'], 'compute')
    self.assertNotEqual(found, now)
    odd = {'runs': [1, 2], 'x': None}
    self.assertEqual(with_defaults(odd, {'runs': [run]}), odd)


class ChangedTest(parameterized.TestCase):
  def test_an_ablation_is_one_line_and_changes_nothing_else(self):
    config = ds.presets.v3_tiny()
    other = ds.changed(config, {'moe.router.scoring': 'softmax'})
    self.assertEqual(other.moe.router.scoring, 'softmax')
    self.assertEqual(config.moe.router.scoring, 'sigmoid')
    back = ds.changed(other, {'moe.router.scoring': 'sigmoid'})
    self.assertEqual(back, config)

  def test_several_fields_and_whole_parts(self):
    attention = GQAConfig(4, 2, 32)
    other = ds.changed(
      ds.presets.v3_tiny(), {'attention': attention, 'mtp.depth': 0, 'dim': 64}
    )
    self.assertEqual(
      (other.attention, other.mtp.depth, other.dim), (attention, 0, 64)
    )

  @parameterized.parameters(
    (
      'moe.router.scorin',
      'softmax',
      r'^moe\.router\.scorin: no such field in RouterConfig; did you mean',
    ),
    ('moe.rooter.scoring', 'softmax', 'no such field in MoEConfig'),
    ('moe.router.scoring', 'hard', r"^moe\.router\.scoring = 'hard': must be"),
    ('dim', '64', r"^dim = '64': is str, must be int$"),
    ('moe.top_k', 99, r'top_k = 99: must lie in 1\.\.experts = 16'),
    ('dim.x', 1, r'^dim\.x: x is a field of 256$'),
  )
  def test_a_wrong_change_is_named(self, path, value, message):
    with self.assertRaisesRegex(ds.InputError, message):
      ds.changed(ds.presets.v3_tiny(), {path: value})

  @parameterized.parameters(
    ('evaluate.batch', 0, r'^evaluate\.batch = 0: must be at least 1$'),
    ('evaluate.documents', 0, r'^evaluate\.documents = 0: must be'),
    ('evaluate.every', -1, r'^evaluate\.every = -1: must be at least 0$'),
    ('evaluate.stride', 0, r'^evaluate\.stride = 0: must be at least 1$'),
    ('evaluate.stride', 257, r'^evaluate\.stride = 257: .*seq_len = 256$'),
    ('data.heldout_fraction', 0.0, r'^evaluate\.every = 5: data\.heldout_fr'),
    ('keep', 0, r'^keep = 0: must be at least 1'),
    ('keep', -1, r'^keep = -1: must be at least 1'),
    ('checkpoint_every', -1, r'^checkpoint_every = -1: must be'),
    ('seed', 2**63, r'^seed = 9223372036854775808: must lie in'),
    ('seed', -1, r'^seed = -1: must lie in'),
    ('train.optimizer.clip', 0.0, r'^train\.optimizer: clip = 0\.0: must be'),
    ('train.optimizer.clip', math.nan, r'optimizer: clip = nan: must be'),
    ('train.optimizer.eps', 0.0, r'^train\.optimizer: eps = 0\.0: must be'),
    ('train.optimizer.decay', -0.1, r'optimizer: decay = -0\.1: must be'),
    ('train.tokens', 0.0, r'^train: tokens = 0\.0: must be above 0'),
    ('train.tokens', math.nan, r'^train: tokens = nan: must be finite'),
    ('train.tokens', math.inf, r'^train: tokens = inf: must be finite'),
    ('train.schedule.peak', math.nan, r'^train\.schedule: peak = nan'),
    ('train.schedule.peak', math.inf, r'^train\.schedule: peak = inf'),
    ('train.gate.sigma', -1.0, r'^train\.gate: sigma = -1\.0: must be'),
    ('train.gate.warmup', 0, r'^train\.gate: warmup = 0: must be at least 1'),
    ('train.gate.sigma', math.nan, r'^train\.gate: sigma = nan: must be'),
    (
      'model.moe.capacity.factor',
      0.0,
      r'^model\.moe\.capacity\.factor = 0\.0: m',
    ),
    ('model.moe.capacity.devices', 0, r'\.capacity\.devices = 0: must be'),
    ('model.moe.capacity.exempt', 1.5, r'exempt = 1\.5: must lie in 0\.\.1$'),
  )
  def test_a_run_that_makes_no_sense_is_named(self, path, value, message):
    run = RunConfig(
      model=ds.changed(
        ds.presets.v3_tiny(), {'moe.capacity': CapacityConfig()}
      ),
      data=DataConfig(vocab_size=260),
      train=TrainConfig(1e6, schedules.BatchConfig(8)),
      evaluate=EvaluateConfig(every=5),
    )
    values = node = ds.to_dict(run)
    *parents, last = path.split('.')
    for key in parents:
      node = node[key]
    node[last] = value
    with self.assertRaisesRegex(ds.InputError, message):
      ds.from_dict(RunConfig, values)

  @parameterized.parameters(
    (
      {
        'moe.experts': 32,
        'moe.top_k': 20,
        'moe.router.groups': 1,
        'moe.router.top_groups': 1,
      },
    ),
    (
      {
        'moe.experts': 6,
        'moe.router.groups': 3,
        'moe.router.top_groups': 2,
        'moe.top_k': 2,
      },
    ),
    (
      {
        'vocab_size': 99,
        'moe.router.hash_vocab': 99,
        'moe.router.bias': False,
        'moe.router.groups': 1,
        'moe.router.top_groups': 1,
      },
    ),
    ({'mtp.streams': True, 'residual': HyperConnectionsConfig()},),
  )
  def test_the_result_is_checked_and_no_step_on_the_way(self, changes):
    pairs = list(changes.items())
    for order in (pairs, pairs[::-1]):
      try:
        config = ds.changed(ds.presets.v3_tiny(), dict(order))
      except ds.InputError as error:
        self.fail(str(error))
      for path, value in pairs:
        got = functools.reduce(getattr, path.split('.'), config)
        self.assertEqual(got, value, path)

  def test_a_part_and_then_a_field_of_it(self):
    part = {'attention': GQAConfig(6, 2, 8)}
    one = ds.changed(ds.presets.v3_tiny(), {**part, 'attention.heads': 4})
    self.assertEqual(one.attention, GQAConfig(4, 2, 8))
    other = ds.changed(ds.presets.v3_tiny(), {'attention.heads': 4, **part})
    self.assertEqual(other.attention, GQAConfig(6, 2, 8))

  def test_nor_in_a_kind(self):
    for change in (
      (('moe.experts', 2), ('moe.top_k', 1)),
      (('moe.top_k', 1), ('moe.experts', 2)),
    ):
      change += (('moe.router.groups', 1), ('moe.router.top_groups', 1))
      kinds = {**ds.presets.v3_tiny().kinds, 'moe': Kind('moe', change)}
      config = ds.changed(ds.presets.v3_tiny(), {'kinds': kinds})
      self.assertEqual(config.block('moe').ffn.experts, 2)

  @parameterized.parameters(
    ({'kinds.moe': 'x'}, r"^kinds\.moe = 'x': is str, must be Kind$"),
    ({'kinds.new': 3}, r'^kinds\.new = 3: is int, must be Kind$'),
    ({'kinds.new.ffn': 'moe'}, r'^kinds\.new\.ffn: ffn is a field of None$'),
    ({'kinds.moe.ffn': 'x'}, r"^kinds\.moe\.ffn = 'x': must be one of"),
    ({'kinds.moe.change': ((1, 2),)}, r'kind\.change = .*: write pairs'),
    ({'kinds.moe.change': ('ab', 3)}, r'kind\.change = .*: write pairs'),
    ({'engram.base': 5}, r'^engram\.base: base is a field of None$'),
    ({'moe.top_k': 99, 'dim': 64}, r'top_k = 99: must lie in 1\.\.experts'),
    ({'moe': {'experts': 2}}, r'^moe\.top_k: missing'),
    ({5: 5}, r'^5: no such field in TransformerConfig'),
    ({'': 5}, r'^: no such field in TransformerConfig'),
  )
  def test_more_wrong_changes_are_named(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      ds.changed(ds.presets.v3_tiny(), changes)

  def test_values_of_dicts_are_made(self):
    config = ds.changed(ds.presets.v3_tiny(), {'kinds.moe': {'ffn': 'moe'}})
    self.assertEqual(config.kinds['moe'], Kind('moe'))

  def test_configurations_are_frozen(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      ds.presets.v3_tiny().dim = 3


if __name__ == '__main__':
  absltest.main()
