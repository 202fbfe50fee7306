"""Logits, gradients and cached decoding equal those of transformers."""

import numpy as np
import parity_harness as ph
from absl.testing import absltest, parameterized

_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}

# Each case departs from the family's default in what its name says.
FAST = {
  'v3': ('v3', {}),
  'v3_plain_query_half_rope': (
    'v3',
    {'q_lora_rank': None, 'rope_interleave': False, 'n_shared_experts': 2},
  ),
  'v3_all_dims_differ_yarn': (
    'v3',
    {
      'hidden_size': 36,
      'num_attention_heads': 3,
      'num_key_value_heads': 3,
      'qk_nope_head_dim': 6,
      'qk_rope_head_dim': 14,
      'v_head_dim': 9,
      'n_group': 1,
      'topk_group': 1,
      'num_experts_per_tok': 8,
      'rope_scaling': ph.yarn(mscale=1.0, mscale_all_dim=1.0),
    },
  ),
  'v3_top1_unnormalized_yarn_mscales_differ': (
    'v3',
    {
      'num_experts_per_tok': 1,
      'norm_topk_prob': False,
      'first_k_dense_replace': 0,
      'rope_scaling': ph.yarn(mscale=0.7, mscale_all_dim=1.3),
    },
  ),
  'v2': ('v2', {'n_shared_experts': 2}),
  'v2_group_limited_yarn': (
    'v2',
    {
      'topk_method': 'group_limited_greedy',
      'n_group': 4,
      'topk_group': 2,
      'routed_scaling_factor': 16.0,
      'q_lora_rank': None,
      'rope_scaling': ph.yarn(mscale=0.707, mscale_all_dim=0.707),
    },
  ),
  'llama_grouped_llama3_tied': (
    'llama',
    {
      'num_attention_heads': 6,
      'head_dim': 10,
      'hidden_size': 36,
      'tie_word_embeddings': True,
      'rope_scaling': _LLAMA3,
    },
  ),
  'qwen3_moe': ('qwen3_moe', {}),
  'qwen3_moe_mixed_dense_yarn_tied': (
    'qwen3_moe',
    {
      'hidden_size': 36,
      'num_hidden_layers': 4,
      'num_attention_heads': 6,
      'head_dim': 14,
      'decoder_sparse_step': 2,
      'mlp_only_layers': [3],
      'norm_topk_prob': False,
      'rms_norm_eps': 1e-2,
      'tie_word_embeddings': True,
      'rope_scaling': ph.yarn(),
    },
  ),
}
FORWARD_ONLY = {
  'v3_all_layers_dense': ('v3', {'first_k_dense_replace': 3}),
  'v3_two_groups': ('v3', {'n_group': 2, 'topk_group': 1}),
  'v3_no_shared_expert': ('v3', {'n_shared_experts': 0}),
  'v3_tied': ('v3', {'tie_word_embeddings': True}),
  'v3_yarn_without_mscale': ('v3', {'rope_scaling': ph.yarn()}),
  'v3_yarn_only_mscale_all_dim': (
    'v3',
    {'rope_scaling': ph.yarn(mscale_all_dim=0.8)},
  ),
  'v3_yarn_attention_factor': (
    'v3',
    {'rope_scaling': ph.yarn(mscale_all_dim=0.8, attention_factor=1.7)},
  ),
  'v3_yarn_only_mscale': ('v3', {'rope_scaling': ph.yarn(mscale=0.8)}),
  'v3_linear': ('v3', {'rope_scaling': {'type': 'linear', 'factor': 3.0}}),
  # As deepseek-coder-6.7b has it.
  'llama_linear': (
    'llama',
    {
      'rope_theta': 100000.0,
      'rope_scaling': {'type': 'linear', 'factor': 4.0},
    },
  ),
  'v2_two_dense_two_groups': (
    'v2',
    {
      'first_k_dense_replace': 2,
      'topk_method': 'group_limited_greedy',
      'n_group': 2,
      'topk_group': 1,
      'num_experts_per_tok': 4,
    },
  ),
  # Numbers of Moonlight and Kimi-K2 that V3 itself doesn't have.
  'v3_as_moonlight': (
    'v3',
    {
      'q_lora_rank': None,
      'n_group': 1,
      'topk_group': 1,
      'n_shared_experts': 2,
      'rms_norm_eps': 1e-5,
      'rope_theta': 50000.0,
      'routed_scaling_factor': 2.446,
    },
  ),
  'v3_as_kimi_k2': (
    'v3',
    {
      'n_group': 1,
      'topk_group': 1,
      'rope_theta': 50000.0,
      'rope_scaling': ph.yarn(beta_fast=1, mscale=1.0, mscale_all_dim=1.0),
    },
  ),
  'qwen3_moe_one_expert_linear': (
    'qwen3_moe',
    {
      'num_experts_per_tok': 1,
      'num_key_value_heads': 4,
      'rope_scaling': {'type': 'linear', 'factor': 3.0},
    },
  ),
  'qwen3_moe_all_experts': ('qwen3_moe', {'num_experts_per_tok': 8}),
  'llama_multi_query': ('llama', {'num_key_value_heads': 1}),
  'llama_multi_head': ('llama', {'num_key_value_heads': 4}),
}


DECODE = (
  'v3_plain_query_half_rope',
  'v2_group_limited_yarn',
  'llama_grouped_llama3_tied',
  'qwen3_moe_mixed_dense_yarn_tied',
)


def _named(cases):
  return parameterized.named_parameters(
    (name, *case) for name, case in cases.items()
  )


class ParityTest(parameterized.TestCase):
  def assert_logits_equal(self, ours, theirs):
    self.assertGreater(theirs.std(), 0.1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ph.LOGITS_ATOL)

  @_named(FORWARD_ONLY)
  def test_logits_equal(self, family, fields):
    pair = ph.pair(family, **fields)
    ids = ph.tokens(pair)
    self.assert_logits_equal(ph.logits(pair, ids), ph.their_logits(pair, ids))

  @_named(FAST)
  def test_logits_and_gradient_of_every_parameter_equal(self, family, fields):
    pair = ph.pair(family, **fields)
    ids = ph.tokens(pair)
    logits, ours = ph.gradients(pair, ids)
    self.assert_logits_equal(logits, ph.their_logits(pair, ids))
    theirs = ph.their_gradients(pair, ids)
    buffers = {n for n in ours if n.endswith('e_score_correction_bias')}
    self.assertEqual(set(ours) - buffers, set(theirs))
    for name, grad in theirs.items():
      np.testing.assert_allclose(
        ours[name], grad, rtol=0, atol=ph.GRAD_ATOL, err_msg=name
      )
    self.assertGreater(max(np.abs(g).max() for g in theirs.values()), 1e-2)

  @_named({name: FAST[name] for name in DECODE})
  def test_cached_decoding_equals(self, family, fields):
    pair = ph.pair(family, **fields)
    ids = ph.tokens(pair, length=12)
    theirs = ph.their_decoded(pair, ids, prompt=5)
    self.assert_logits_equal(ph.decoded(pair, ids, prompt=5), theirs)


if __name__ == '__main__':
  absltest.main()
