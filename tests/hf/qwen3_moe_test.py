"""Qwen3-MoE: its released file, its names, and what it cannot mean."""

import os
import tempfile

import chex
import config_json_test
import hf_models
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import (
  config_json,
  config_render,
  record,
  saving,
)
from deepseek_jax.hf.source import Source

# Qwen3-30B-A3B, field by field.
RELEASED = {
  'architectures': ['Qwen3MoeForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 151643,
  'decoder_sparse_step': 1,
  'eos_token_id': 151645,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'initializer_range': 0.02,
  'intermediate_size': 6144,
  'max_position_embeddings': 40960,
  'max_window_layers': 48,
  'mlp_only_layers': [],
  'model_type': 'qwen3_moe',
  'moe_intermediate_size': 768,
  'norm_topk_prob': True,
  'num_attention_heads': 32,
  'num_experts': 128,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 48,
  'num_key_value_heads': 4,
  'output_router_logits': False,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000.0,
  'router_aux_loss_coef': 0.001,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.51.0',
  'use_cache': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
# Another name and rope_parameters, as transformers 5 saves it.
_RESAVED = {
  k: v
  for k, v in RELEASED.items()
  if k not in ('num_experts', 'rope_scaling', 'rope_theta')
} | {
  'num_local_experts': 128,
  'rope_parameters': {'rope_theta': 1000000.0, 'rope_type': 'default'},
}


def weights(config):
  """Tensors of a bfloat16 folder, and the numbers in all of them."""
  listed = saving.stored(config, saving.Format('bfloat16'))
  shapes = {one.name: one.part.leaf.theirs for one in listed}
  return shapes, sum(int(np.prod(s)) for s in shapes.values())


class ConfigTest(parameterized.TestCase):
  def test_released_file_is_read_whole(self):
    parsed = config_json.parse(RELEASED)
    config = parsed.config
    self.assertEqual(parsed.family.model_type, 'qwen3_moe')
    self.assertEqual(config.attention.heads, 32)
    self.assertEqual(config.attention.kv_heads, 4)
    self.assertTrue(config.attention.qk_norm)
    self.assertEqual(config.attention.rope.theta, 1e6)
    self.assertEqual(config.layout, ((('moe',), 48),))
    self.assertEqual(config.moe.shared, 0)
    self.assertEqual(config.moe.router.scoring, 'softmax')
    self.assertTrue(config.moe.router.normalize)
    self.assertFalse(config.moe.router.bias)
    again = config_render.render(config, parsed.carried)
    missing = {k: v for k, v in RELEASED.items() if again.get(k, v) != v}
    self.assertEqual(missing, {})
    self.assertEqual(config_json.parse(again).config, config)

  def test_names_of_transformers_5_mean_the_same(self):
    parsed = config_json.parse(_RESAVED)
    self.assertEqual(parsed.config, config_json.parse(RELEASED).config)

  def test_published_number_of_weights(self):
    """30.5 billion, 29.9 without embedding and head, by its model card."""
    shapes, count = weights(config_json.parse(RELEASED).config)
    self.assertEqual(count, 30_532_122_624)
    self.assertLen(shapes, 48 * (4 + 2 + 2 + 1 + 3 * 128) + 3)
    layer = 'model.layers.47.'
    self.assertEqual(shapes[f'{layer}self_attn.q_norm.weight'], (128,))
    self.assertEqual(shapes[f'{layer}self_attn.q_proj.weight'], (4096, 2048))
    self.assertEqual(shapes[f'{layer}mlp.gate.weight'], (128, 2048))
    name = f'{layer}mlp.experts.127.down_proj.weight'
    self.assertEqual(shapes[name], (2048, 768))

  @parameterized.parameters(
    ({}, (), (('moe',), 4)),
    ({'decoder_sparse_step': 2}, (), (('dense', 'moe'), 2)),
    ({'mlp_only_layers': [0]}, (('dense',), 1), (('moe',), 3)),
  )
  def test_dense_layers(self, change, *layout):
    fields = RELEASED | {'num_hidden_layers': 4} | change
    config = config_json.parse(fields).config
    self.assertEqual(config.layout, tuple(part for part in layout if part))
    again = config_json.parse(config_render.render(config)).config
    self.assertEqual(again, config)

  @parameterized.parameters(
    ({'num_experts': None}, 'num_experts = None: must be int'),
    ({'num_experts': 1 << 30}, 'num_experts = 1073741824: must be at'),
    ({'num_local_experts': 64}, 'num_experts = 128: contradicts num_local'),
    ({'decoder_sparse_step': 0}, 'decoder_sparse_step = 0'),
    ({'decoder_sparse_step': 49}, 'leaves no layer with experts'),
    ({'mlp_only_layers': [48]}, r'mlp_only_layers = \[48\]: .* 0..47'),
    ({'mlp_only_layers': ['0']}, 'mlp_only_layers.*list of int'),
    ({'mlp_only_layers': 3}, 'mlp_only_layers = 3: must be a list'),
    ({'use_sliding_window': True}, 'use_sliding_window = True: not supp'),
    ({'attention_bias': True}, 'attention_bias = True'),
    ({'n_routed_experts': 8}, 'n_routed_experts = 8: not understood for qwen3'),
    ({'n_shared_experts': 1}, 'n_shared_experts = 1: not understood'),
    ({'first_k_dense_replace': 1}, 'first_k_dense_replace = 1: not under'),
    ({'num_key_value_heads': 5}, 'kv_heads = 5: must divide heads = 32'),
    ({'num_experts_per_tok': 129}, 'top_k = 129'),
    (
      {'rope_scaling': {'type': 'llama3', 'factor': 8.0}},
      "rope_scaling.type = 'llama3'",
    ),
    (
      {'hidden_size': 1 << 20, 'moe_intermediate_size': 1 << 22},
      'parameters; at most',
    ),
  )
  def test_what_it_cannot_mean_is_refused(self, change, message):
    with self.assertRaisesRegex(InputError, f'config.json: .*{message}'):
      config_json.parse(RELEASED | change)

  def test_field_of_another_family_is_not_skipped(self):
    for fields in (config_json_test._LLAMA, RELEASED):
      with self.assertRaisesRegex(InputError, 'first_k_dense_replace = 3'):
        config_json.parse(fields | {'first_k_dense_replace': 3})

  @parameterized.parameters(
    ({'moe.shared': 1}, 'moe.shared = 1'),
    ({'moe.router.scoring': 'sigmoid'}, "moe.router.scoring = 'sigmoid'"),
    ({'moe.router.scale': 2.0}, 'moe.router.scale = 2.0'),
    ({'moe.router.groups': 2}, 'moe.router.groups = 2'),
    ({'attention.norm_eps': 1e-3}, 'attention.norm_eps = 0.001'),
    ({'attention.rope.interleaved': True}, 'qwen3_moe files pair halves'),
    ({'layout': ((('dense',), 2),)}, 'attention = gqa with qk_norm and'),
  )
  def test_what_files_cannot_say_is_refused(self, change, message):
    config = ds.changed(hf_models.QWEN3_MOE, change)
    with self.assertRaisesRegex(InputError, message):
      config_render.render(config)


class FolderTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def test_float8_quantises_matrices_and_neither_norms_nor_routers(self):
    config = hf_models.QWEN3_MOE
    variables = hf_models.variables(config)
    hf.save(self.root, config, variables, quantize='fp8')
    source = Source(self.root)
    scaled = {n for n in source.entries if n.endswith('_scale_inv')}
    self.assertLen(scaled, 4 * 4 + 2 * 3 + 2 * 3 * 4)
    for name in scaled:
      self.assertNotRegex(name, 'norm|mlp.gate.w|embed|lm_head')
    _, back = hf.load(self.root)
    router = lambda v: v['params']['segments'][0][1]['ffn']['router']
    chex.assert_trees_all_equal(router(back), router(variables))

  def test_a_layer_too_many_is_an_error(self):
    config = hf_models.QWEN3_MOE
    hf.save(self.root, config, hf_models.variables(config))
    fields = config_render.render(config)
    fields |= {'num_hidden_layers': 2, 'mlp_only_layers': [0]}
    record.write_json(os.path.join(self.root, 'config.json'), fields)
    with self.assertRaisesRegex(InputError, 'layers.2.* belongs to nothing'):
      Source(self.root)


if __name__ == '__main__':
  absltest.main()
