"""Random V4 models of transformers beside ours: same weights, same tokens."""

import tempfile

import numpy as np
import parity_harness as ph

from deepseek_jax import hf
from deepseek_jax.hf.families import v4_names

torch, transformers = ph.torch, ph.transformers

SLIDING = 'sliding_attention'
CSA = 'compressed_sparse_attention'
HCA = 'heavily_compressed_attention'

BASE = {
  'vocab_size': 61,
  'hidden_size': 24,
  'moe_intermediate_size': 12,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'head_dim': 16,
  'qk_rope_head_dim': 8,
  'q_lora_rank': 20,
  'num_experts_per_tok': 2,
  'n_routed_experts': 6,
  'layer_types': [SLIDING, CSA, HCA],
  'mlp_layer_types': ['hash_moe', 'moe', 'moe'],
  'compress_rates': {CSA: 4, HCA: 8},
  'sliding_window': 5,
  'o_groups': 2,
  'o_lora_rank': 6,
  'index_n_heads': 16,
  'index_head_dim': 12,
  'index_topk': 3,
  'max_position_embeddings': 512,
  'attn_implementation': 'eager',
  'experts_implementation': 'eager',
}


def make_theirs(seed: int = 0, **fields):
  """A random model: no norm is one, no bias and no sink is zero."""
  fields = {**BASE, **fields}
  config = transformers.DeepseekV4Config(**fields)
  model = transformers.DeepseekV4ForCausalLM(config).float().eval()
  generator = torch.Generator().manual_seed(seed)
  draw = lambda like: torch.randn(like.shape, generator=generator)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name.endswith('norm.weight'):
        p.copy_(1 + 0.3 * draw(p))
      elif p.ndim == 1 or 'mlp.gate.' in name or 'position_bias' in name:
        p.copy_(0.7 * draw(p))
      else:
        p.copy_(draw(p) * p.shape[-1] ** -0.5)
    for name, b in model.named_buffers():
      if name.endswith('e_score_correction_bias'):
        b.copy_(0.3 * draw(b) - 1.5)
      if name.endswith('tid2eid'):
        order = torch.rand(b.shape[0], config.n_routed_experts)
        b.copy_(order.argsort(dim=1)[:, : b.shape[1]])
  return model


def pair(seed: int = 0, **fields) -> ph.Pair:
  """Goes through a folder: transformers writes it, we read it."""
  theirs = make_theirs(seed, **fields)
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    config, variables = hf.load(folder)
  return ph.Pair(theirs, config, variables)


def original(named: dict) -> dict:
  """Arrays by transformers' names -> by original ones, experts apart."""
  out = {}
  for name, value in named.items():
    name = v4_names.original(name)
    for modern, old in (('gate', 'w1'), ('up', 'w3'), ('down', 'w2')):
      name = name.replace(f'.{modern}_proj.weight', f'.{old}.weight')
    stem, _, last = name.rpartition('.')
    if last == 'gate_up_proj':
      for e, both in enumerate(value):
        gate, up = np.split(both, 2)
        out[f'{stem}.{e}.w1.weight'], out[f'{stem}.{e}.w3.weight'] = gate, up
    elif last == 'down_proj':
      for e, one in enumerate(value):
        out[f'{stem}.{e}.w2.weight'] = one
    else:
      out[name] = value
  return out
