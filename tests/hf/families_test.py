"""Families: what is written is read back, field by field, or refused."""

import dataclasses
import pkgutil
import typing
from unittest import mock

import hf_models
import hostile_configs
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.errors import InputError
from deepseek_jax.hf import (
  config_json,
  config_limits,
  config_render,
  families,
  names,
)
from deepseek_jax.model.attention.rope import (
  LinearConfig,
  Llama3Config,
  RopeConfig,
  YarnConfig,
)
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.transformer_config import Kind

# How a model is trained and computed, which no config.json holds.
_RECIPE = (
  'compute',
  'attention.block',
  'attention.csa.block',
  'attention.csa.loss',
  'attention.csa.recall_queries',
  'attention.loss',
  'attention.recall_queries',
  'lora',
  'moe.balance',
  'moe.capacity',
  'moe.float8',
  'residual.alpha',
  'residual.diagonal',
)
_SCALINGS = (
  None,
  LinearConfig(3.0),
  Llama3Config(original_length=64),
  YarnConfig(factor=4.0, mscale=0.7, mscale_all_dim=None),
  YarnConfig(factor=4.0, attention_factor=1.5),
)


def tiny_models():
  """One model of every family, by model_type."""
  out = {}
  for config in hostile_configs.configs().values():
    out[families.of(config).model_type] = config
  return out


MODELS = tiny_models()


def fields(config, path=''):
  """(dotted path, its type, value) of every field, also inside of parts."""
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, where = getattr(config, field.name), f'{path}{field.name}'
    yield where, hints[field.name], value
    if dataclasses.is_dataclass(value):
      yield from fields(value, f'{where}.')


def others(hint, value):
  """Values that a field may have in place of `value`."""
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int):
    return [value + 1, value * 2, value * 3, 1, 2, 0]
  if isinstance(value, float):
    return [value * 2, value + 0.5]
  choices = typing.get_args(hint)
  if isinstance(value, str):
    return [c for c in choices if c != value]
  if isinstance(value, RopeConfig):
    return [dataclasses.replace(value, scaling=s) for s in _SCALINGS]
  if value is None:
    return [v for t, v in ((int, 5), (float, 2.5)) if t in choices]
  return [None] if type(None) in choices else []


def model(config):
  """All of a model that files have to hold."""
  blocks = [b for s in config.segments() for b in s.blocks * s.repeat]
  predicts = config.block(config.mtp.block) if config.mtp.depth else None
  rest = [config.vocab_size, config.dim, config.norm_eps, config.init_std]
  rest += [config.tied, config.mtp.depth, config.mtp.depth and config.mtp]
  return [_normal(b) for b in blocks], predicts and _normal(predicts), rest


def _normal(block):
  """A block's fields by path, without its recipe and what has no effect."""
  return {
    path: value
    for path, _, value in fields(block)
    if not dataclasses.is_dataclass(value)
    and not path.replace('ffn.', 'moe.').startswith(_RECIPE)
    and not _off(block, path)
  }


def _off(block, path):
  """Whether a field has no effect beside the others."""
  router, attention = getattr(block.ffn, 'router', None), block.attention
  if path == 'ffn.router.group_score':
    return router.groups == 1
  if path == 'attention.norm_eps':
    return not getattr(attention, 'qk_norm', True)
  # V4 has no temperature beside the factor of its tables.
  scaled = isinstance(attention, SharedKVConfig) and 'scaling.mscale' in path
  return scaled and attention.compress_rope.scaling is not None


def changed(config, path, value):
  """The model with one field changed, or None where that makes no model."""
  try:
    return ds.changed(config, {path: value})
  except InputError:
    return None


class RoundTripTest(parameterized.TestCase):
  def assert_kept_or_refused(self, config, what):
    """Whether a file holds the model; fails where it holds another one."""
    try:
      written = config_render.render(config)
    except InputError:
      return False
    back = config_json.parse(written).config
    if model(back) != model(config):
      # Arrays without a name are refused later, when they are listed.
      with self.assertRaises(InputError, msg=f'{what}: is lost'):
        names.leaves(config)
      return False
    self.assertEqual(families.of(back), families.of(config), what)
    return True

  @parameterized.parameters(*MODELS)
  def test_every_field_is_kept_or_refused(self, family):
    config, kept = MODELS[family], 0
    self.assertTrue(self.assert_kept_or_refused(config, family))
    for path, hint, value in fields(config):
      if path.startswith(('compute', 'lora', 'engram', 'layout', 'kinds')):
        continue
      for other in others(hint, value):
        new = changed(config, path, other)
        if new is not None:
          kept += self.assert_kept_or_refused(new, f'{path} = {other!r}')
    self.assertGreater(kept, 15)

  @parameterized.parameters(*MODELS)
  def test_a_layer_that_departs_is_kept_or_refused(self, family):
    """Also the block of multi-token prediction."""
    config, refused, tried = MODELS[family], 0, 0
    kind = config.layout[-1][0][-1]
    if config.moe is None:
      changes = ['attention.rope.theta', 'ffn.width']
    else:
      changes = ['attention.rope.theta', 'moe.router.scale', 'moe.width']
    mtp = config.mtp.depth or family in ('deepseek_v3', 'deepseek_v4')
    for path in changes:
      # What the changes depart from is the number of all other layers.
      was = next(v for p, _, v in fields(config) if p == path)
      change = (*config.kinds[kind].change, (path, 2 * was))
      own = Kind(config.kinds[kind].ffn, change)
      kinds = {**config.kinds, 'own': own, kind: own}
      made = [{'kinds': kinds}]
      if mtp:
        kinds = {**config.kinds, 'own': own}
        made.append({'kinds': kinds, 'mtp.depth': 1, 'mtp.block': 'own'})
      for change in made:
        tried += 1
        new = ds.changed(config, change)
        refused += not self.assert_kept_or_refused(new, f'{path}, {change}')
    self.assertEqual(refused, tried)

  @parameterized.parameters('csa', 'hca', 'window_hash')
  def test_v4_predicts_with_a_window_alone(self, block):
    config = ds.changed(ds.presets.v4_tiny(), {'mtp.block': block})
    with self.assertRaisesRegex(InputError, f"mtp.block = '{block}'.*'window'"):
      config_render.render(config)
    # Without prediction the block is of no account.
    config = ds.changed(config, {'mtp.depth': 0})
    self.assertTrue(self.assert_kept_or_refused(config, block))

  def test_v3_predicts_with_experts(self):
    config = ds.changed(hf_models.V3, {'mtp.block': 'dense'})
    with self.assertRaisesRegex(InputError, "mtp.block = 'dense': is dense"):
      config_render.render(config)


class ListTest(parameterized.TestCase):
  def test_every_module_with_a_family_is_listed(self):
    path = families.__path__
    modules = [m.name for m in pkgutil.iter_modules(path)]
    found = [
      getattr(getattr(families, name), 'FAMILY', None) for name in modules
    ]
    self.assertCountEqual([f for f in found if f], families.FAMILIES)
    self.assertCountEqual(MODELS, [f.model_type for f in families.FAMILIES])

  def test_every_number_of_a_file_has_a_limit(self):
    for family in families.FAMILIES:
      limits = config_limits.LIMITS | family.limits
      for name, field in family.mapped.items():
        if field.kind not in (bool, str):
          for spelling in filter(None, (name, field.also)):
            self.assertIn(spelling, limits, family.model_type)

  @parameterized.parameters('gpt2', None, 7, (['llama'],))
  def test_an_unknown_family_is_answered_with_the_known_ones(self, name):
    with self.assertRaises(InputError) as caught:
      config_json.parse({'model_type': name})
    line = str(caught.exception)
    self.assertNotIn('\n', line)
    for family in families.FAMILIES:
      self.assertIn(family.model_type, line)

  @parameterized.parameters(
    ('moe_16b', 'attention = gqa with experts'),
    ('nsa_tiny', 'attention = nsa with experts and mtp'),
  )
  def test_a_model_of_no_family_is_answered_with_the_known_ones(
    self, preset, message
  ):
    config = getattr(ds.presets, preset)()
    for ask in (families.of, config_render.render, names.leaves):
      with self.assertRaisesRegex(InputError, message) as caught:
        ask(config)
      for family in families.FAMILIES:
        self.assertIn(family.model_type, str(caught.exception))

  def test_a_family_is_one_record(self):
    """A family of a name of its own needs nothing outside of it."""
    llama = families.named('llama')
    own = dataclasses.replace(
      llama,
      model_type='own',
      architecture='OwnForCausalLM',
      names=dataclasses.replace(llama.names, layer='blocks.{}.'),
    )
    with mock.patch.object(families, 'FAMILIES', (own, *families.FAMILIES)):
      written = config_render.render(hf_models.LLAMA)
      self.assertEqual(written['model_type'], 'own')
      self.assertIs(config_json.parse(written).family, own)
      listed = [leaf.prefixes for leaf in names.leaves(hf_models.LLAMA)]
    self.assertIn(('blocks.0.', 'blocks.1.'), listed)


if __name__ == '__main__':
  absltest.main()
