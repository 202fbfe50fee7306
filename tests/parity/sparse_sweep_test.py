"""V3.2 and V4 of shapes drawn at random: forward and decoding equal."""

import numpy as np
import parity_harness as ph
import pytest
import v4_harness as v4
from absl.testing import absltest, parameterized

_CASES = 16


def _picks(seed: int):
  rng = np.random.default_rng(seed)
  return lambda *options: options[rng.integers(len(options))]


def draw_v32(seed: int) -> dict:
  """A valid choice of every field; index heads enough that none ties."""
  pick = _picks(seed)
  groups = pick(1, 2, 4)
  experts = groups * pick(2, 3)
  top_groups = pick(*range(1, groups + 1))
  rope = pick(2, 6, 8)
  return {
    'hidden_size': pick(18, 24, 36),
    'num_hidden_layers': pick(1, 2, 3),
    'num_attention_heads': pick(1, 3, 4),
    'q_lora_rank': pick(5, 16),
    'kv_lora_rank': pick(4, 7, 24),
    'qk_nope_head_dim': pick(3, 8),
    'qk_rope_head_dim': rope,
    'v_head_dim': pick(1, 5, 10),
    'first_k_dense_replace': pick(0, 1),
    'n_routed_experts': experts,
    'n_group': groups,
    'topk_group': top_groups,
    'num_experts_per_tok': pick(1, 2),
    'n_shared_experts': pick(1, 2),
    'rms_norm_eps': pick(1e-6, 1e-3),
    'rope_scaling': pick(None, ph.yarn(mscale=1.0, mscale_all_dim=1.0)),
    'index_n_heads': pick(20, 27),
    'index_head_dim': rope + pick(0, 1, 5),
    'index_topk': pick(1, 2, 7, 23, 24, 99),
  }


def draw_v4(seed: int) -> dict:
  pick = _picks(seed)
  layers = pick(2, 3)
  groups = pick(1, 2, 3)
  rope = pick(2, 4, 8)
  csa, hca = pick(2, 3, 4, 5), pick(1, 6, 7, 40)
  kinds = [pick(v4.SLIDING, v4.CSA, v4.CSA, v4.HCA) for _ in range(layers)]
  return {
    'hidden_size': pick(12, 24, 30),
    'num_hidden_layers': layers,
    'layer_types': kinds,
    'mlp_layer_types': [pick('hash_moe', 'moe') for _ in range(layers)],
    'compress_rates': {v4.CSA: csa, v4.HCA: hca},
    'num_attention_heads': groups * pick(1, 2),
    'head_dim': rope + pick(2, 4, 10),
    'qk_rope_head_dim': rope,
    'q_lora_rank': pick(5, 20),
    'o_groups': groups,
    'o_lora_rank': pick(1, 6),
    'sliding_window': pick(1, 2, 5, 60),
    'index_n_heads': pick(20, 27),
    'index_head_dim': rope + pick(0, 1, 4),
    'index_topk': pick(1, 2, 4, 99),
    'hc_mult': pick(1, 2, 3, 4),
    'hc_sinkhorn_iters': pick(1, 2, 20),
    'n_routed_experts': pick(3, 6),
    'num_experts_per_tok': pick(1, 2, 3),
    'moe_intermediate_size': pick(1, 12),
    'scoring_func': pick('sqrtsoftplus', 'sigmoid'),
    'routed_scaling_factor': pick(1.5, 2.5),
    'swiglu_limit': pick(0.5, 10.0),
    'rms_norm_eps': pick(1e-6, 1e-3),
  }


@pytest.mark.slow
class SparseSweepTest(parameterized.TestCase):
  @parameterized.product(seed=tuple(range(_CASES)), family=('v32', 'v4'))
  def test_forward_and_decoding_equal(self, seed, family):
    if family == 'v32':
      fields = draw_v32(seed)
      pair = ph.pair('v32', seed, **fields)
    else:
      fields = draw_v4(seed)
      pair = v4.pair(seed, **fields)
    ids = ph.tokens(pair, length=24)
    theirs = ph.their_logits(pair, ids)
    near = {
      'rtol': 0,
      'atol': ph.LOGITS_ATOL * max(1.0, np.abs(theirs).max()),
      'err_msg': str(fields),
    }
    np.testing.assert_allclose(ph.logits(pair, ids), theirs, **near)
    prompt = 1 + 5 * seed % 23
    got = ph.decoded(pair, ids, prompt)
    np.testing.assert_allclose(got, theirs, **near)


if __name__ == '__main__':
  absltest.main()
