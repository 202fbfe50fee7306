"""Converts what V2, V3 and V3.2 have in common: latent attention, experts."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.hf import config_fields
from deepseek_jax.hf.config_fields import Field
from deepseek_jax.hf.config_limits import error
from deepseek_jax.hf.families import plain
from deepseek_jax.hf.families.family import Names
from deepseek_jax.hf.rows import DENSE, NORMS, ROOT, ROUTED, Row, projections
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.presets import layout

ROPES = ('default', 'yarn', 'linear')
MAPPED = {
  **config_fields.COMMON,
  'q_lora_rank': Field('attention.q_rank', int | None),
  'kv_lora_rank': Field('attention.kv_rank', int),
  'qk_nope_head_dim': Field('attention.nope_dim', int),
  'qk_rope_head_dim': Field('attention.rope_dim', int),
  'v_head_dim': Field('attention.v_dim', int),
  'n_routed_experts': Field('moe.experts', int),
  'num_experts_per_tok': Field('moe.top_k', int),
  'moe_intermediate_size': Field('moe.width', int),
  'n_shared_experts': Field('moe.shared', int | None),
  'routed_scaling_factor': Field('moe.router.scale', float),
  'norm_topk_prob': Field('moe.router.normalize', bool),
}
SPECIAL = frozenset(
  {
    'first_k_dense_replace',
    'head_dim',
    'n_group',
    'num_key_value_heads',
    'qk_head_dim',
    'topk_group',
  }
)
FIXED = config_fields.FIXED | {
  'moe_layer_freq': (1,),
  'mtp_hidden_states_first': (False,),
}

_ATTENTION = (
  Row('attention.kv_down', 'self_attn.kv_a_proj_with_mqa.weight', 1),
  Row('attention.kv_norm.scale', 'self_attn.kv_a_layernorm.weight'),
  Row('attention.kv_up', 'self_attn.kv_b_proj.weight', 1),
  Row('attention.out', 'self_attn.o_proj.weight', 2),
)
_QUERY = (Row('attention.q_up', 'self_attn.q_proj.weight', 1),)
_COMPRESSED_QUERY = (
  Row('attention.q_down', 'self_attn.q_a_proj.weight', 1),
  Row('attention.q_norm.scale', 'self_attn.q_a_layernorm.weight'),
  Row('attention.q_up', 'self_attn.q_b_proj.weight', 1),
)
_MOE = (
  *ROUTED,
  Row('ffn.router.bias', 'mlp.gate.e_score_correction_bias'),
  *projections('ffn.shared.', 'mlp.shared_experts.'),
)
# eh_proj takes [embedding; hidden], which is also the order of `merge`.
_MTP = (
  Row('embed_norm.scale', 'enorm.weight'),
  Row('hidden_norm.scale', 'hnorm.weight'),
  Row('merge', 'eh_proj.weight', 1, fp8=False),
  Row('norm.scale', 'shared_head.norm.weight'),
)


def block_rows(block: BlockConfig) -> tuple[Row, ...]:
  """Returns the table of one layer."""
  plain_query = block.attention.q_rank is None
  query = _QUERY if plain_query else _COMPRESSED_QUERY
  ffn = _MOE if isinstance(block.ffn, MoEConfig) else DENSE
  return (*NORMS, *query, *_ATTENTION, *ffn)


NAMES = Names(
  root=ROOT,
  block=block_rows,
  mtp=_MTP,
  mtp_marks=('enorm.weight', 'hnorm.weight', 'eh_proj.weight'),
  # Ours are shared with the main model.
  mtp_copies={
    'embed_tokens.weight': 'model.embed_tokens.weight',
    'shared_head.head.weight': 'lm_head.weight',
  },
)


def parse(
  fields: Mapping[str, Any], values: Mapping[str, Any], *, mtp: int
) -> dict[str, Any]:
  """Returns layout, MTP and shared experts; no rope, router and attention.

  Args:
    fields: of the file.
    values: of the mapped fields.
    mtp: depths of multi-token prediction.
  """
  derived = {
    'num_key_value_heads': values['attention.heads'],
    'head_dim': values['attention.rope_dim'],
    'qk_head_dim': values['attention.nope_dim'] + values['attention.rope_dim'],
  }
  for name, value in derived.items():
    if fields.get(name) not in (None, value):
      raise error(name, fields[name], f'not supported; must be {value}')
  layers, dense = counts(fields)
  return {
    'layout': layout(dense, layers - dense),
    'mtp.depth': mtp,
    'moe.shared': values['moe.shared'] or 0,
  }


def counts(fields: Mapping[str, Any]) -> tuple[int, int]:
  """Returns how many layers there are, and how many of them begin dense."""
  layers = config_fields.layers(fields)
  return layers, min(
    config_fields.needed(fields, 'first_k_dense_replace'), layers
  )


def without_unused(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict:
  """Returns further values; where no layer has experts, ours has no MoE.

  Args:
    values: of the mapped fields.
    more: what a family adds.
  """
  used = any('moe' in names for names, _ in more['layout'])
  if used or more['mtp.depth']:
    return dict(more)
  drop = {k: None for k in (*values, *more) if k.startswith('moe.')}
  return {**more, **drop, 'moe': None}


def render(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields of attention and layers; InputError names a misfit."""
  dense = plain.leading_dense(plain.expert_layers(config))
  plain.require(config.attention.norm_eps, 'attention.norm_eps', 1e-6)
  return {
    **plain.FIXED_FIELDS,
    **plain.dense_width(config),
    'num_key_value_heads': config.attention.heads,
    'first_k_dense_replace': dense,
    'moe_layer_freq': 1,
  }
