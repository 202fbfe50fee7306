"""Defines Qwen3-MoE: grouped queries with normed heads, experts by softmax.

Any layers may be dense: those that mlp_only_layers lists, and those whose
number from 1 on decoder_sparse_step doesn't divide.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.hf import config_fields, rope_json
from deepseek_jax.hf.config_fields import Field
from deepseek_jax.hf.config_limits import Range, error
from deepseek_jax.hf.families import grouped, plain
from deepseek_jax.hf.families.family import Family, Names
from deepseek_jax.hf.families.plain import require, require_router
from deepseek_jax.hf.rows import ROOT
from deepseek_jax.model.transformer_config import TransformerConfig

_ROPES = ('default', 'yarn', 'linear')
_MAPPED = grouped.MAPPED | {
  # transformers 5 writes the other name.
  'num_experts': Field('moe.experts', int, also='num_local_experts'),
  'num_experts_per_tok': Field('moe.top_k', int),
  'moe_intermediate_size': Field('moe.width', int),
  'norm_topk_prob': Field('moe.router.normalize', bool),
}
_COUNT = Range(1, 1 << 14)


def _fits(config: TransformerConfig) -> bool:
  """Returns whether a model has grouped queries, normed heads and experts."""
  return grouped.fits(config, qk_norm=True, experts=True)


def _parse(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns attention, rope, layout and router."""
  return {
    **config_fields.heads(fields, values),
    'attention.rope': rope_json.parse(fields, _ROPES, interleaved=False),
    'attention.qk_norm': True,
    'attention.norm_eps': values['norm_eps'],
    'layout': config_fields.compact(_kinds(fields)),
    'moe.shared': 0,
    'moe.router.scoring': 'softmax',
    'moe.router.bias': False,
  }


def _kinds(fields: Mapping[str, Any]) -> list[str]:
  """Returns the kind of every layer."""
  layers = config_fields.layers(fields)
  dense = config_fields.listed(fields, 'mlp_only_layers', int) or ()
  if any(not 0 <= i < layers for i in dense):
    fix = f'must be numbers of layers, 0..{layers - 1}'
    raise error('mlp_only_layers', dense, fix)
  step = config_fields.integer(fields, 'decoder_sparse_step') or 1
  alone = frozenset(dense)  # a hostile list is long
  sparse = lambda i: i not in alone and (i + 1) % step == 0
  if not any(map(sparse, range(layers))):
    raise error('mlp_only_layers', dense, 'leaves no layer with experts')
  return ['moe' if sparse(i) else 'dense' for i in range(layers)]


def _render(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields of attention, rope, layers and router."""
  experts = plain.expert_layers(config)
  moe = config.moe
  require(config.attention.norm_eps, 'attention.norm_eps', config.norm_eps)
  require(moe.shared, 'moe.shared', 0)
  require_router(moe.router, scoring='softmax', bias=False, groups=1, scale=1.0)
  return {
    **grouped.render(config, _ROPES, FAMILY.model_type),
    'decoder_sparse_step': 1,
    'mlp_only_layers': [i for i, sparse in enumerate(experts) if not sparse],
    'use_sliding_window': False,
  }


FAMILY = Family(
  model_type='qwen3_moe',
  architecture='Qwen3MoeForCausalLM',
  about='gqa with qk_norm, experts by softmax',
  fits=_fits,
  mapped=_MAPPED,
  special=grouped.SPECIAL | {'mlp_only_layers', 'decoder_sparse_step'},
  fixed=grouped.FIXED | {'use_sliding_window': (False, None)},
  # Without use_sliding_window the other two mean nothing.
  carried=frozenset(
    {'router_aux_loss_coef', 'sliding_window', 'max_window_layers'}
  ),
  limits={
    'num_experts': _COUNT,
    'num_local_experts': _COUNT,
    'decoder_sparse_step': Range(1, 1024),
  },
  parse=_parse,
  render=_render,
  names=Names(root=ROOT, block=grouped.block_rows),
)
