import dataclasses

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_json, config_render
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.capacity import CapacityConfig

# As released, field by field.
_V3 = {
  'architectures': ['DeepseekV3ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV3Config'},
  'bos_token_id': 0,
  'eos_token_id': 1,
  'ep_size': 1,
  'first_k_dense_replace': 3,
  'hidden_act': 'silu',
  'hidden_size': 7168,
  'initializer_range': 0.02,
  'intermediate_size': 18432,
  'kv_lora_rank': 512,
  'max_position_embeddings': 163840,
  'model_type': 'deepseek_v3',
  'moe_intermediate_size': 2048,
  'moe_layer_freq': 1,
  'n_group': 8,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'norm_topk_prob': True,
  'num_attention_heads': 128,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 61,
  'num_key_value_heads': 128,
  'num_nextn_predict_layers': 1,
  'q_lora_rank': 1536,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'quantization_config': {
    'activation_scheme': 'dynamic',
    'fmt': 'e4m3',
    'quant_method': 'fp8',
    'weight_block_size': [128, 128],
  },
  'rms_norm_eps': 1e-06,
  'rope_scaling': {
    'beta_fast': 32,
    'beta_slow': 1,
    'factor': 40,
    'mscale': 1.0,
    'mscale_all_dim': 1.0,
    'original_max_position_embeddings': 4096,
    'type': 'yarn',
  },
  'rope_theta': 10000,
  'routed_scaling_factor': 2.5,
  'scoring_func': 'sigmoid',
  'tie_word_embeddings': False,
  'topk_group': 4,
  'topk_method': 'noaux_tc',
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.33.1',
  'use_cache': True,
  'v_head_dim': 128,
  'vocab_size': 129280,
}
_V2_LITE = {
  k: v
  for k, v in _V3.items()
  if k not in ('num_nextn_predict_layers', 'quantization_config')
} | {
  'architectures': ['DeepseekV2ForCausalLM'],
  'aux_loss_alpha': 0.001,
  'first_k_dense_replace': 1,
  'hidden_size': 2048,
  'intermediate_size': 10944,
  'model_type': 'deepseek_v2',
  'moe_intermediate_size': 1408,
  'n_group': 1,
  'n_routed_experts': 64,
  'n_shared_experts': 2,
  'norm_topk_prob': False,
  'num_attention_heads': 16,
  'num_experts_per_tok': 6,
  'num_hidden_layers': 27,
  'num_key_value_heads': 16,
  'q_lora_rank': None,
  'rope_scaling': _V3['rope_scaling']
  | {'mscale': 0.707}
  | {'mscale_all_dim': 0.707},
  'routed_scaling_factor': 1.0,
  'scoring_func': 'softmax',
  'seq_aux': True,
  'topk_group': 1,
  'topk_method': 'greedy',
  'vocab_size': 102400,
}
_LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 128000,
  'eos_token_id': [128001, 128008, 128009],
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'use_cache': True,
  'vocab_size': 128256,
}


def _architecture(config):
  """Without the training recipe, which no config.json holds."""
  moe = config.moe
  if moe:
    moe = dataclasses.replace(moe, balance=BalanceConfig(), capacity=None)
  return dataclasses.replace(config, moe=moe, init_std=0.02)


class PublishedTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('v3', _V3, ds.presets.v3),
    ('v2_lite', _V2_LITE, ds.presets.v2_lite),
    ('llama31_8b', _LLAMA, ds.presets.llama31_8b),
  )
  def test_released_file_is_the_preset(self, fields, preset):
    ours = config_json.parse(fields).config
    # greedy has no groups, so how they would be scored is of no account.
    wanted = _architecture(preset())
    if wanted.moe and wanted.moe.router.groups == 1:
      wanted = ds.changed(wanted, {'moe.router.group_score': 'max'})
    self.assertEqual(ours, wanted)

  @parameterized.parameters('v3', 'v2', 'v2_lite', 'llama31_8b', 'v3_tiny')
  def test_round_trip_keeps_the_architecture(self, name):
    config = _architecture(getattr(ds.presets, name)())
    fields = config_render.render(config)
    back = config_json.parse(fields).config
    if name == 'v2_lite':
      back = ds.changed(back, {'moe.router.group_score': 'top2'})
    blocks = lambda c: [b for s in c.segments() for b in s.blocks * s.repeat]
    self.assertEqual(blocks(back), blocks(config))
    self.assertEqual(back, ds.changed(config, {'layout': back.layout}))

  def test_what_does_not_change_the_model_is_carried(self):
    carried = config_json.parse(_LLAMA).carried
    self.assertEqual(carried['eos_token_id'], [128001, 128008, 128009])
    self.assertEqual(carried['max_position_embeddings'], 131072)
    config = config_json.parse(_LLAMA).config
    again = config_render.render(config, carried)
    self.assertEqual(again['eos_token_id'], [128001, 128008, 128009])

  def test_training_recipe_does_not_hinder_saving(self):
    config = ds.changed(
      ds.presets.v2(), {'moe.capacity': CapacityConfig(devices=8)}
    )
    self.assertEqual(config_render.render(config)['n_group'], 8)


class RefusedTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('unknown', {'attention_sinks': 4}, 'attention_sinks = 4: not understood'),
    ('of_another_family', {'mlp_only_layers': []}, 'mlp_only_layers'),
    ('activation', {'hidden_act': 'gelu'}, "hidden_act = 'gelu'.*'silu'"),
    ('attention_bias', {'attention_bias': True}, 'attention_bias = True'),
    ('scoring', {'scoring_func': 'softmax'}, 'scoring_func'),
    ('topk_method', {'topk_method': 'greedy'}, 'topk_method'),
    ('moe_layer_freq', {'moe_layer_freq': 2}, 'moe_layer_freq = 2'),
    ('kv_heads', {'num_key_value_heads': 8}, 'must be 128'),
    ('head_dim', {'head_dim': 128}, 'head_dim = 128: .*must be 64'),
    ('architecture', {'architectures': ['X']}, 'architectures'),
    ('model_type', {'model_type': 'gpt2'}, "model_type = 'gpt2'"),
    ('text_for_number', {'hidden_size': '7168'}, "hidden_size = '7168'"),
    ('bool_for_number', {'hidden_size': True}, 'hidden_size = True'),
    ('number_for_bool', {'norm_topk_prob': 1}, 'norm_topk_prob = 1'),
    ('groups', {'n_group': 7}, 'router.groups = 7: must divide experts'),
    ('rope_type', {'rope_scaling': {'type': 'dynamic'}}, "'dynamic'"),
    ('rope_key', {'rope_scaling': {'type': 'yarn', 'x': 1}}, r'x = 1'),
    ('rope_missing', {'rope_scaling': {'type': 'yarn'}}, 'factor: missing'),
    (
      'rope_twice',
      {'rope_parameters': {'rope_type': 'default'}},
      'both rope_parameters and rope_scaling',
    ),
    (
      'rope_names_differ',
      {'rope_scaling': {'type': 'yarn', 'rope_type': 'default'}},
      'rope_type',
    ),
    (
      'untruncated',
      {'rope_scaling': _V3['rope_scaling'] | {'truncate': False}},
      'truncate = False',
    ),
    ('interleave', {'rope_interleave': None}, 'rope_interleave = None'),
    ('quantization', {'quantization_config': {'quant_method': 'awq'}}, 'awq'),
    (
      'block',
      {'quantization_config': {'quant_method': 'fp8'}},
      'weight_block_size = None',
    ),
    ('mtp_twice', {'num_mtp_layers': 2}, 'contradicts num_mtp_layers'),
  )
  def test_field_is_named(self, fields, message):
    with self.assertRaisesRegex(InputError, message):
      config_json.parse(_V3 | fields)

  def test_missing_field_is_named(self):
    names = ('hidden_size', 'q_lora_rank', 'n_group', 'first_k_dense_replace')
    for name in names:
      fields = {k: v for k, v in _V3.items() if k != name}
      with self.assertRaisesRegex(InputError, f'{name}: missing'):
        config_json.parse(fields)

  def test_llama_has_no_yarn(self):
    with self.assertRaisesRegex(InputError, "'yarn': must be one of"):
      config_json.parse(_LLAMA | {'rope_scaling': _V3['rope_scaling']})

  @parameterized.named_parameters(
    ('bias', 'v3', {'moe.router.bias': False}, 'moe.router.bias = False'),
    ('softmax_mtp', 'v3', {'moe.router.scoring': 'softmax'}, 'moe.router.bias'),
    ('latent_eps', 'v3', {'attention.norm_eps': 1e-5}, 'attention.norm_eps'),
    (
      'blocks',
      'v32',
      {'attention.indexer.blocks': {}},
      'attention.indexer.blocks',
    ),
    ('v2_half', 'v2', {'attention.rope.interleaved': False}, 'interleaved'),
    (
      'llama_rope',
      'llama31_8b',
      {'attention.rope.interleaved': True},
      'halves',
    ),
    ('gqa_moe', 'moe_16b', {}, 'attention = gqa'),
    (
      'layers_differ',
      'v3',
      {'kinds.moe.change': (('attention.rope.theta', 5e5),)},
      'layer 3: its attention differs',
    ),
    (
      'dense_after_moe',
      'v3_tiny',
      {'layout': ((('moe', 'dense'), 2),)},
      'dense layer follows',
    ),
  )
  def test_model_that_no_file_can_hold_is_named(self, preset, change, message):
    config = ds.changed(getattr(ds.presets, preset)(), change)
    with self.assertRaisesRegex(InputError, message):
      config_render.render(config)

  def test_extra_field_must_be_harmless(self):
    with self.assertRaisesRegex(InputError, 'hidden_act: not one of'):
      config_render.render(ds.presets.v3(), {'hidden_act': 'gelu'})


if __name__ == '__main__':
  absltest.main()
