"""Checkpoints that are published, by what is known of their folders."""

import json
import math
import os
import tempfile
from pathlib import Path
from unittest import mock

import chex
import config_json_test
import hf_models
import hostile_configs
import numpy as np
import origin_test
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import (
  config_json,
  config_render,
  families,
  loading,
  safetensors_io,
  saving,
  source,
)
from deepseek_jax.hf.source import Source
from deepseek_jax.model.attention.rope import LinearConfig

_V3 = config_json_test._V3
_KIMI_K2 = _V3 | {
  'model_type': 'kimi_k2',
  'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV3Config'},
  'eos_token_id': 163585,
  'bos_token_id': 163584,
  'first_k_dense_replace': 1,
  'max_position_embeddings': 131072,
  'n_group': 1,
  'n_routed_experts': 384,
  'num_attention_heads': 64,
  'num_key_value_heads': 64,
  'num_nextn_predict_layers': 0,
  'rope_scaling': _V3['rope_scaling']
  | {'beta_fast': 1.0, 'beta_slow': 1.0, 'factor': 32.0},
  'rope_theta': 50000.0,
  'routed_scaling_factor': 2.827,
  'topk_group': 1,
  'vocab_size': 163840,
}
_MOONLIGHT = {
  'architectures': ['DeepseekV3ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'aux_loss_alpha': 0.001,
  'bos_token_id': 163584,
  'eos_token_id': 163585,
  'ep_size': 1,
  'first_k_dense_replace': 1,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'initializer_range': 0.02,
  'intermediate_size': 11264,
  'kv_lora_rank': 512,
  'max_position_embeddings': 8192,
  'model_type': 'deepseek_v3',
  'moe_intermediate_size': 1408,
  'moe_layer_freq': 1,
  'n_group': 1,
  'n_routed_experts': 64,
  'n_shared_experts': 2,
  'norm_topk_prob': True,
  'num_attention_heads': 16,
  'num_experts_per_tok': 6,
  'num_hidden_layers': 27,
  'num_key_value_heads': 16,
  'num_nextn_predict_layers': 0,
  'pretraining_tp': 1,
  'q_lora_rank': None,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'rms_norm_eps': 1e-05,
  'rope_scaling': None,
  'rope_theta': 50000.0,
  'routed_scaling_factor': 2.446,
  'scoring_func': 'sigmoid',
  'seq_aux': True,
  'tie_word_embeddings': False,
  'topk_group': 1,
  'topk_method': 'noaux_tc',
  'torch_dtype': 'bfloat16',
  'use_cache': True,
  'v_head_dim': 128,
  'vocab_size': 163840,
}
_V4_FLASH_0731 = {
  'architectures': ['DeepseekV4ForCausalLM'],
  'model_type': 'deepseek_v4',
  'vocab_size': 129280,
  'hidden_size': 4096,
  'moe_intermediate_size': 2048,
  'num_hidden_layers': 43,
  'num_attention_heads': 64,
  'num_key_value_heads': 1,
  'head_dim': 512,
  'qk_rope_head_dim': 64,
  'q_lora_rank': 1024,
  'o_lora_rank': 1024,
  'o_groups': 8,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'num_experts_per_tok': 6,
  'norm_topk_prob': True,
  'scoring_func': 'sqrtsoftplus',
  'topk_method': 'noaux_tc',
  'routed_scaling_factor': 1.5,
  'hc_mult': 4,
  'hc_sinkhorn_iters': 20,
  'hc_eps': 1e-6,
  'rms_norm_eps': 1e-6,
  'swiglu_limit': 10.0,
  'sliding_window': 128,
  'index_n_heads': 64,
  'index_head_dim': 128,
  'index_topk': 512,
  'num_hash_layers': 3,
  'num_nextn_predict_layers': 1,
  'compress_ratios': [0, 0] + [4, 128] * 20 + [4, 0, 0, 0],
  'rope_theta': 10000,
  'compress_rope_theta': 160000,
  'rope_scaling': {
    'type': 'yarn',
    'factor': 16,
    'original_max_position_embeddings': 65536,
    'beta_fast': 32,
    'beta_slow': 1,
  },
  'max_position_embeddings': 1048576,
  'expert_dtype': 'fp4',
  'quantization_config': {
    'quant_method': 'fp8',
    'fmt': 'e4m3',
    'scale_fmt': 'ue8m0',
    'weight_block_size': [128, 128],
    'activation_scheme': 'dynamic',
  },
  'dspark_block_size': 5,
  'dspark_markov_rank': 256,
  'dspark_noise_token_id': 128799,
  'dspark_target_layer_ids': [40, 41, 42],
}
_DRAFTER = (
  'mtp.0.main_proj.weight',
  'mtp.0.main_norm.weight',
  'mtp.1.attn.wq_a.weight',
  'mtp.2.markov_head.markov_w1.weight',
  'mtp.2.confidence_head.proj.weight',
)


def add_tensors(folder, names):
  """Writes a folder's single file anew with further tensors."""
  path = os.path.join(folder, 'model.safetensors')
  held = {
    name: safetensors_io.read(entry)
    for name, entry in safetensors_io.read_header(path).items()
  }
  held |= {name: np.ones((2, 3), np.float32) for name in names}
  about = {name: (a.dtype, a.shape) for name, a in held.items()}
  with safetensors_io.Writer(path, about) as writer:
    for name, array in held.items():
      writer.write(name, array)


def change_config(folder, **fields):
  path = Path(folder, 'config.json')
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def saved(self, config, name='hf', **options):
    folder = os.path.join(self.root, name)
    variables = hf_models.variables(config)
    hf.save(folder, config, variables, **options)
    return folder, variables

  def test_kimi_k2_is_a_v3(self):
    kimi = config_json.parse(_KIMI_K2)
    v3 = config_json.parse(_KIMI_K2 | {'model_type': 'deepseek_v3'})
    self.assertEqual(kimi, v3)
    self.assertEqual(kimi.config.moe.experts, 384)
    again = config_render.render(kimi.config, kimi.carried)
    self.assertEqual(again['model_type'], 'deepseek_v3')
    with self.assertRaisesRegex(InputError, 'architectures'):
      other = {'architectures': ['KimiLinearForCausalLM']}
      config_json.parse(_KIMI_K2 | other)

  def test_moonlight_is_a_v3(self):
    parsed = config_json.parse(_MOONLIGHT)
    self.assertIs(parsed.family, families.named('deepseek_v3'))
    self.assertIs(parsed.family, families.named('kimi_k2'))
    self.assertIsNone(parsed.config.attention.q_rank)
    self.assertEqual(parsed.config.norm_eps, 1e-5)
    self.assertEqual(parsed.config.layout, ((('dense',), 1), (('moe',), 26)))
    self.assertEqual(parsed.config.moe.router.scale, 2.446)
    listed = saving.stored(parsed.config, saving.Format('bfloat16'))
    count = sum(math.prod(one.part.leaf.theirs) for one in listed)
    self.assertBetween(count, 15.95e9, 15.97e9)  # 16B by its card
    again = config_json.parse(config_render.render(parsed.config))
    self.assertEqual(again.config, parsed.config)

  @parameterized.parameters(
    ({'model_type': 'deepseek'}, "model_type = 'deepseek'"),
    ({'model_type': 'qwen2'}, "model_type = 'qwen2'"),
    ({'model_type': 'kimi_k25'}, "model_type = 'kimi_k25'"),
    ({'model_type': 'glm_moe_dsa'}, "model_type = 'glm_moe_dsa'"),
    (
      {
        'quantization_config': {
          'config_groups': {'group_0': {'weights': {'num_bits': 4}}},
          'format': 'pack-quantized',
          'quant_method': 'compressed-tensors',
        }
      },
      "quant_method = 'compressed-tensors'",
    ),
  )
  def test_what_the_table_refuses_is_refused_by_name(self, fields, message):
    with self.assertRaisesRegex(InputError, message):
      config_json.parse(_KIMI_K2 | fields)

  def test_the_table_has_every_family(self):
    path = Path(__file__).parents[2] / 'docs' / 'checkpoints.md'
    text = path.read_text()
    for family in families.FAMILIES:
      for name in (family.model_type, *family.aliases):
        self.assertRegex(text, rf'\| {name} \|')

  def test_kimi_k2_folder_is_loaded(self):
    folder, variables = self.saved(hf_models.V3)
    change_config(folder, model_type='kimi_k2')
    config, back = hf.load(folder, mtp=True)
    self.assertEqual(config.layout, hf_models.V3.layout)
    chex.assert_trees_all_equal(back, variables)

  def test_backbone_of_v4_flash_0731_is_that_of_v4_flash(self):
    parsed = config_json.parse(_V4_FLASH_0731)
    wanted = ds.presets.v4_flash()
    self.assertEqual(parsed.config.attention, wanted.attention)
    self.assertEqual(parsed.config.layers, 43)
    self.assertEqual(parsed.config.mtp.depth, 0)
    self.assertLen(parsed.drafter, 4)
    self.assertEmpty([k for k in parsed.carried if 'dspark' in k])

  @parameterized.parameters(True, False)
  def test_drafter_is_named_and_the_backbone_read(self, declared):
    """Also where its fields of config.json were taken out."""
    config = config_json.parse(hostile_configs.V4).config
    folder, variables = self.saved(config)
    add_tensors(folder, _DRAFTER)
    fields = {k: v for k, v in _V4_FLASH_0731.items() if 'dspark' in k}
    change_config(
      folder, num_nextn_predict_layers=1, **(fields if declared else {})
    )
    opened = Source(folder, mtp=None)
    self.assertTrue(opened.drafter)
    named = [n for n, why in opened.unused.items() if 'DSpark drafter' in why]
    self.assertContainsSubset(_DRAFTER, named)
    self.assertLen(named, 5 + 4 * declared)
    with mock.patch.object(loading.logging, 'warning') as said:
      config, back = hf.load(folder)
    self.assertIn('DSpark drafter', str(said.call_args_list))
    self.assertEqual(config.mtp.depth, 0)
    chex.assert_trees_all_equal(back, variables)
    with self.assertRaisesRegex(InputError, 'mtp = True.*drafter'):
      hf.load(folder, mtp=True)

  def test_a_tensor_of_nothing_is_still_an_error(self):
    folder, _ = self.saved(config_json.parse(hostile_configs.V4).config)
    add_tensors(folder, ['layers.0.main_proj.weight'])
    with self.assertRaisesRegex(InputError, 'belongs to nothing'):
      Source(folder)

  @parameterized.parameters(None, False)
  def test_prediction_that_v4_does_not_declare_is_named(self, mtp):
    folder, variables = self.saved(config_json.parse(hostile_configs.V4).config)
    add_tensors(folder, ['mtp.0.enorm.weight', 'mtp.1.attn.wq_a.weight'])
    opened = Source(folder, mtp=mtp)
    self.assertLen(opened.unused, 2)
    self.assertIn('not declare', opened.unused['mtp.1.attn.wq_a.weight'])
    chex.assert_trees_all_equal(hf.load(folder)[1], variables)

  @parameterized.parameters(-1, 4)
  def test_hash_table_names_experts_that_exist(self, wrong):
    config = config_json.parse(hostile_configs.V4).config
    variables = hf_models.variables(config)
    router = variables['buffers']['segments'][0][0]['ffn']['router']
    router['table'] = router['table'].at[0, 3, 1].set(wrong)
    folder = os.path.join(self.root, 'hf')
    hf.save(folder, config, variables)
    with self.assertRaisesRegex(InputError, f'holds {wrong}: must be numbers'):
      hf.load(folder)

  @parameterized.parameters(None, False)
  def test_prediction_that_v3_does_not_declare_is_named(self, mtp):
    folder, variables = self.saved(hf_models.V3)
    change_config(folder, num_nextn_predict_layers=0)
    opened = Source(folder, mtp=mtp)
    self.assertIn('not declare', opened.unused['model.layers.3.enorm.weight'])
    back = hf.load(folder)[1]
    del variables['params']['mtp'], variables['buffers']['mtp']
    chex.assert_trees_all_equal(back, variables)

  def test_a_layer_too_many_is_an_error(self):
    folder, _ = self.saved(hf_models.LLAMA)
    change_config(folder, num_hidden_layers=1)
    with self.assertRaisesRegex(InputError, 'layers.1.* belongs to nothing'):
      Source(folder)

  def test_fields_of_unsloth_are_carried(self):
    fields = {'unsloth_fixed': True, 'unsloth_version': '2025.1'}
    parsed = config_json.parse(config_json_test._LLAMA | fields)
    again = config_render.render(parsed.config, parsed.carried)
    self.assertEqual(again['unsloth_fixed'], True)
    self.assertEqual(again['unsloth_version'], '2025.1')
    parsed = config_json.parse(_V4_FLASH_0731 | fields)
    self.assertEqual(parsed.carried['unsloth_fixed'], True)

  def test_linear_scaling_there_and_back(self):
    scaling = {'type': 'linear', 'factor': 4.0}
    fields = config_json_test._LLAMA | {'rope_scaling': scaling}
    parsed = config_json.parse(fields)
    self.assertEqual(parsed.config.attention.rope.scaling, LinearConfig(4.0))
    again = config_render.render(parsed.config, parsed.carried)
    self.assertEqual(again['rope_scaling'], scaling | {'rope_type': 'linear'})
    self.assertEqual(config_json.parse(again).config, parsed.config)
    with self.assertRaisesRegex(InputError, 'factor: missing'):
      config_json.parse(fields | {'rope_scaling': {'type': 'linear'}})

  def test_name_of_the_hub_is_answered_with_the_download(self):
    with self.assertRaisesRegex(
      InputError, 'hf download deepseek-ai/DeepSeek-V2-Lite --local-dir'
    ):
      hf.load('deepseek-ai/DeepSeek-V2-Lite')
    self.assertNotIn('download', source.absent('runs/a/b'))
    self.assertNotIn('download', source.absent('/no/such'))

  def test_unused_tensors_of_one_kind_share_a_line(self):
    lines = source.summary({f'a.{i}': 'is odd' for i in range(700)})
    self.assertEqual(lines, ['a.0 and 699 more are not used: each is odd'])

  def test_files_of_the_tokenizer_come_along_both_ways(self):
    folder, _ = self.saved(hf_models.LLAMA)
    files = {
      'tokenizer.json': '{}',
      'tokenizer_config.json': '{"a": 1}',
      'tiktoken.model': 'IQ== 0\n',
      'tokenizer.model': 'sp',
      'added_tokens.json': '{"<x>": 5}',
      'special_tokens_map.json': '{}',
      'vocab.json': '{}',
      'merges.txt': '#version',
      'generation_config.json': '{"eos_token_id": [1, 2]}',
      'chat_template.jinja': '{{ x }}',
      'chat_template.json': '{"chat_template": "x"}',
      'additional_chat_templates/tools.jinja': '{{ y }}',
      'tokenization_kimi.py': 'pass\n',
    }
    for name, text in files.items():
      os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
      Path(folder, name).write_text(text)
    Path(folder, 'notes.txt').write_text('not of the tokenizer')
    store, back = (os.path.join(self.root, n) for n in ('store', 'back'))
    done = origin_test.convert(
      (folder, store, '--dtype=float32'), (store, back)
    )
    self.assertEqual(done, [(0, ''), (0, '')])
    for name, text in files.items():
      self.assertEqual(Path(store, name).read_text(), text)
      self.assertEqual(Path(back, name).read_text(), text)
    self.assertFalse(os.path.exists(os.path.join(back, 'notes.txt')))


if __name__ == '__main__':
  absltest.main()
