"""Many more shapes, drawn at random: logits equal in every one."""

import numpy as np
import parity_harness as ph
import pytest
from absl.testing import absltest, parameterized

_CASES = 40


def draw(seed: int) -> tuple[str, dict]:
  """A family and a valid choice of every field that it has."""
  rng = np.random.default_rng(seed)
  pick = lambda *options: options[rng.integers(len(options))]
  family = ('v3', 'v2', 'llama', 'qwen3_moe')[seed % 4]
  heads = pick(1, 2, 3, 4)
  fields = {
    'vocab_size': pick(17, 61, 128),
    'hidden_size': heads * pick(6, 10, 16),
    'intermediate_size': pick(8, 33, 64),
    'num_hidden_layers': pick(1, 2, 4),
    'num_attention_heads': heads,
    'tie_word_embeddings': pick(False, True),
    'rms_norm_eps': pick(1e-6, 1e-5, 1e-2),
  }
  if family in ('llama', 'qwen3_moe'):
    divisors = [n for n in (1, 2, 3, 4) if heads % n == 0]
    fields['num_key_value_heads'] = pick(*divisors)
    fields['head_dim'] = pick(2, 6, 16)
    if family == 'qwen3_moe':
      fields |= _grouped(fields['num_hidden_layers'], pick)
    return family, fields
  return family, fields | _latent(family, fields, pick)


def _grouped(layers, pick):
  experts = pick(2, 3, 8)
  return {
    'num_experts': experts,
    'num_experts_per_tok': pick(*range(1, experts + 1)),
    'moe_intermediate_size': pick(1, 7, 16),
    'norm_topk_prob': pick(False, True),
    'decoder_sparse_step': pick(1, 2) if layers > 1 else 1,
    'mlp_only_layers': pick([], [0]) if layers > 1 else [],
    'rope_scaling': pick(None, ph.yarn(), {'type': 'linear', 'factor': 3.0}),
  }


def _latent(family, fields, pick):
  groups = pick(1, 2, 4)
  experts = groups * pick(2, 3, 4)
  top_groups = pick(*range(1, groups + 1))
  reach = experts // groups * top_groups
  out = {
    'q_lora_rank': pick(None, 5, 16),
    'kv_lora_rank': pick(4, 7, 24),
    'qk_nope_head_dim': pick(3, 8, 12),
    'qk_rope_head_dim': pick(2, 6, 8),
    'v_head_dim': pick(1, 5, 10),
    'first_k_dense_replace': pick(*range(fields['num_hidden_layers'] + 1)),
    'moe_intermediate_size': pick(1, 7, 16),
    'n_routed_experts': experts,
    'n_group': groups,
    'topk_group': top_groups,
    'num_experts_per_tok': pick(*range(1, min(reach, 8) + 1)),
    'n_shared_experts': pick(0, 1, 2),
    'routed_scaling_factor': pick(1.0, 2.5),
    'rope_scaling': pick(
      None,
      ph.yarn(),
      ph.yarn(mscale=1.0, mscale_all_dim=1.0),
      ph.yarn(mscale=0.7, mscale_all_dim=1.3),
      ph.yarn(mscale_all_dim=0.707),
    ),
  }
  if family == 'v3':
    out['norm_topk_prob'] = pick(False, True)
    out['rope_interleave'] = pick(False, True)
  else:
    out['topk_method'] = pick('greedy', 'group_limited_greedy')
    # torch turns V2's rope channels as complex numbers: at even places only.
    out['kv_lora_rank'] *= 2
    out['qk_nope_head_dim'] *= 2
  return out


@pytest.mark.slow
class SweepTest(parameterized.TestCase):
  @parameterized.parameters(*range(_CASES))
  def test_logits_equal(self, seed):
    family, fields = draw(seed)
    pair = ph.pair(family, seed, **fields)
    ids = ph.tokens(pair)
    theirs = ph.their_logits(pair, ids)
    np.testing.assert_allclose(
      ph.logits(pair, ids),
      theirs,
      rtol=0,
      atol=ph.LOGITS_ATOL * max(1.0, np.abs(theirs).max()),
      err_msg=str(fields),
    )


if __name__ == '__main__':
  absltest.main()
