"""V4's config.json: both spellings agree, and each field is named as it is."""

import hostile_configs
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_json, config_render
from deepseek_jax.hf.families import v4_names
from deepseek_jax.hf.safetensors_io import Entry

_CSA, _HCA = 'compressed_sparse_attention', 'heavily_compressed_attention'
_TYPES = ['sliding_attention', _CSA, _HCA]
_OLD = hostile_configs.V4
_YARN = _OLD['rope_scaling']
# The same model as transformers writes it.
_NEW = {
  k: v
  for k, v in _OLD.items()
  if k not in ('compress_ratios', 'num_hash_layers', 'rope_scaling')
} | {
  'layer_types': _TYPES,
  'mlp_layer_types': ['hash_moe', 'moe', 'moe'],
  'partial_rotary_factor': 0.5,
  'rope_theta': 10000.0,
  'rope_parameters': {
    'main': {
      'rope_type': 'default',
      'rope_theta': 10000.0,
      'partial_rotary_factor': 0.5,
    },
    'compress': {
      **_YARN,
      'rope_type': 'yarn',
      'rope_theta': 160000.0,
      'partial_rotary_factor': 0.5,
      'attention_factor': 1.0,
    },
  },
}


def nested(part, **changes):
  """The ropes of _NEW with fields of one of them changed."""
  ropes = _NEW['rope_parameters']
  return {'rope_parameters': ropes | {part: ropes[part] | changes}}


class SpellingTest(parameterized.TestCase):
  def test_both_spellings_are_one_model(self):
    old, new = (config_json.parse(f).config for f in (_OLD, _NEW))
    self.assertEqual(new, old)
    self.assertEqual(new.attention.rope.theta, 10000.0)
    self.assertEqual(new.attention.compress_rope.theta, 160000.0)
    both = _NEW | {'compress_ratios': [0, 4, 8], 'num_hash_layers': 1}
    self.assertEqual(config_json.parse(both).config, new)

  @parameterized.parameters(
    (_NEW, {'compress_ratios': [0, 8, 4]}, 'compress_ratios.*contradicts'),
    (_NEW, {'num_hash_layers': 2}, 'num_hash_layers = 2: contradicts'),
    (_NEW, {'rope_theta': 5e5}, 'rope_theta = 500000.0: contradicts'),
    (_NEW, {'compress_rope_theta': 5e5}, 'compress_rope_theta.*contradicts'),
    (_NEW, {'rope_scaling': _YARN}, 'both rope_parameters and rope_scaling'),
    (
      _NEW,
      {'rope_parameters': _NEW['rope_parameters'] | {'factor': 9.0}},
      'rope_parameters.factor = 9.0: not understood',
    ),
    (_NEW, {'num_hash_layers': '1'}, "num_hash_layers = '1'"),
    (
      _OLD,
      {'compress_rates': {_CSA: 4, _HCA: 4}, 'compress_ratios': [0, 4, 4]},
      'does not tell layers of one ratio apart',
    ),
    (_OLD, {'compress_ratios': [0, 4]}, 'for each of 3 layers'),
  )
  def test_contradictions_are_named(self, fields, change, message):
    with self.assertRaisesRegex(InputError, message):
      config_json.parse(fields | change)

  def test_one_ratio_of_both_kinds_is_told_apart_by_types(self):
    config = ds.changed(
      config_json.parse(_OLD).config, {'attention.hca.ratio': 4}
    )
    self.assertEqual(
      config_json.parse(config_render.render(config)).config, config
    )

  @parameterized.parameters(
    (_OLD, {'rope_scaling': _YARN | {'factor': 'x'}}, 'rope_scaling.factor'),
    (_OLD, {'rope_scaling': _YARN | {'x': 1}}, 'rope_scaling.x = 1'),
    (_OLD, {'rope_scaling': {'type': 'yarn'}}, 'rope_scaling.factor: missing'),
    (_OLD, {'rope_scaling': {'type': 'linear'}}, 'rope_scaling.type'),
    (_OLD, {'compress_rope_theta': 'x'}, "compress_rope_theta = 'x'"),
    (_OLD, {'rope_theta': 'x'}, "rope_theta = 'x'"),
    (_NEW, nested('compress', factor='x'), 'rope_parameters.compress.factor'),
    (_NEW, nested('compress', x=1), 'rope_parameters.compress.x = 1'),
    (_NEW, nested('main', rope_theta='x'), 'rope_parameters.main.rope_theta'),
    (_NEW, nested('main', rope_type='x'), 'rope_parameters.main.rope_type'),
    (
      _NEW,
      nested('compress', partial_rotary_factor=0.25),
      'rope_parameters.compress.partial_rotary_factor = 0.25: makes 2',
    ),
    (
      _NEW,
      {'rope_parameters': {'main': {}}},
      'rope_parameters.compress = None: must be an object',
    ),
  )
  def test_a_wrong_rope_is_named_by_its_own_field(self, fields, change, named):
    with self.assertRaisesRegex(InputError, f'config.json: {named}'):
      config_json.parse(fields | change)

  def test_base_inside_of_a_flat_rope_is_that_of_windows(self):
    flat = {'rope_parameters': _YARN | {'rope_theta': 5e5}}
    fields = {k: v for k, v in _OLD.items() if k != 'rope_scaling'} | flat
    ropes = config_json.parse(fields).config.attention
    self.assertEqual(ropes.rope.theta, 5e5)
    self.assertEqual(ropes.compress_rope.theta, 160000.0)


class SizeTest(parameterized.TestCase):
  @parameterized.parameters(
    {'o_lora_rank': 1 << 20, 'o_groups': 64, 'num_attention_heads': 64},
    {'index_n_heads': 1 << 14, 'index_head_dim': 1 << 14},
    {'num_attention_heads': 1 << 14, 'head_dim': 1 << 14},
    {
      'n_routed_experts': 1 << 14,
      'moe_intermediate_size': 1 << 21,
      'hidden_size': 1 << 12,
    },
  )
  def test_a_model_beyond_measure_is_refused(self, **change):
    fields = _OLD | change
    with self.assertRaisesRegex(InputError, 'make up to .* parameters'):
      config_json.parse(fields)


class PackedExpertsTest(absltest.TestCase):
  def test_gate_and_up_have_as_many_rows(self):
    name = 'model.layers.0.mlp.experts.gate_up_proj'
    entry = lambda rows: Entry('f', np.dtype(np.float32), (3, rows, 5), 64)
    parts = v4_names.normalized({name: entry(8)})
    self.assertLen(parts, 6)
    third = parts['layers.0.ffn.experts.2.w3.weight']
    self.assertEqual((third.shape, third.start), ((4, 5), 64 + 4 * 5 * 4 * 5))
    with self.assertRaisesRegex(InputError, r'is \[3, 9, 5\]'):
      v4_names.normalized({name: entry(9)})


class RotatedChannelsTest(parameterized.TestCase):
  @parameterized.parameters(
    (100, 0.58, 58, None),  # a float product of 57.99999999999999
    (100, 0.58, 58, 58),
    (44, 30 / 44, 30, 30),  # ... and one of 29.999999999999996
    (44, 30 / 44, 30, None),
    (8, 0.5, 4, 4),
    (512, 0.125, 64, None),
    (300, 0.0066667, 2, None),  # written with few digits
  )
  def test_share_is_counted_exactly(self, head_dim, share, rotated, given):
    fields = _OLD | {
      'head_dim': head_dim,
      'index_head_dim': max(8, rotated),
      'partial_rotary_factor': share,
      'qk_rope_head_dim': given,
    }
    got = config_json.parse(fields).config.attention.rope_dim
    self.assertEqual(got, rotated)

  @parameterized.parameters(
    (100, 0.345, None, 'makes 34.5 of 100 channels'),
    (8, 0.6, None, 'makes 4.8 of 8 channels'),
    (8, 0.5, 6, 'makes 4 of 8 channels, not 6'),
    (8, True, None, 'partial_rotary_factor = True'),
  )
  def test_part_of_a_channel_is_refused(self, head_dim, share, dim, message):
    fields = _OLD | {
      'head_dim': head_dim,
      'partial_rotary_factor': share,
      'qk_rope_head_dim': dim,
    }
    with self.assertRaisesRegex(InputError, message):
      config_json.parse(fields)

  def test_length_of_a_rope_is_whole(self):
    rope = _YARN | {'original_max_position_embeddings': 64.5}
    with self.assertRaisesRegex(InputError, '64.5: must be a whole number'):
      config_json.parse(_OLD | {'rope_scaling': rope})


if __name__ == '__main__':
  absltest.main()
