"""Configurations survive dicts and JSON; a wrong field is named."""

import dataclasses
import json
import math

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data import DataConfig
from deepseek_jax.infer.sampling import SampleConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.experts.moe import CapacityConfig
from deepseek_jax.model.transformer import Kind, TransformerConfig
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

  def test_configurations_are_frozen(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      ds.presets.v3_tiny().dim = 3


if __name__ == '__main__':
  absltest.main()
