"""Defines DeepSeek-V4: windows and compressed entries, hyper-connections.

Both spellings of the layer pattern are written (see `v4_layers`); transformers
takes its own.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields, rope_json
from deepseek_jax.hf.config_fields import Field
from deepseek_jax.hf.config_limits import error
from deepseek_jax.hf.families import v4_layers, v4_names
from deepseek_jax.hf.families.family import Drafter, Family
from deepseek_jax.hf.families.plain import FIXED_FIELDS, require
from deepseek_jax.model.attention.rope import YarnConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.presets import v4_kinds

_MAPPED = {
  'vocab_size': Field('vocab_size', int),
  'hidden_size': Field('dim', int),
  'num_attention_heads': Field('attention.heads', int),
  'head_dim': Field('attention.head_dim', int),
  'q_lora_rank': Field('attention.q_rank', int),
  'o_groups': Field('attention.groups', int),
  'o_lora_rank': Field('attention.o_rank', int),
  'sliding_window': Field('attention.window', int),
  'index_n_heads': Field('attention.csa.index_heads', int),
  'index_head_dim': Field('attention.csa.index_dim', int),
  'index_topk': Field('attention.csa.top_k', int),
  'n_routed_experts': Field('moe.experts', int),
  'num_experts_per_tok': Field('moe.top_k', int),
  'moe_intermediate_size': Field('moe.width', int),
  'n_shared_experts': Field('moe.shared', int),
  'routed_scaling_factor': Field('moe.router.scale', float),
  'swiglu_limit': Field('moe.limit', float),
  'hc_mult': Field('residual.streams', int),
  'hc_sinkhorn_iters': Field('residual.iterations', int),
  'hc_eps': Field('residual.eps', float),
  'rms_norm_eps': Field('norm_eps', float),
  'initializer_range': Field('init_std', float, 0.02),
  'tie_word_embeddings': Field('tied', bool, False),
}
_SPECIAL = frozenset(
  {
    'scoring_func',
    'num_nextn_predict_layers',
    'compress_ratios',
    'compress_rates',
    'layer_types',
    'mlp_layer_types',
    'num_hash_layers',
    'compress_rope_theta',
    'qk_rope_head_dim',
    'partial_rotary_factor',
  }
)
_FIXED = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'attention_dropout': (0, None),
  'norm_topk_prob': (True,),
  'topk_method': ('noaux_tc',),
  'num_key_value_heads': (1,),
  'moe_layer_freq': (1,),
  'pretraining_tp': (1, None),
}
# Fields of training or serving, or ones that the tensors repeat.
_CARRIED = frozenset(
  {'expert_dtype', 'router_aux_loss_coef', 'router_jitter_noise'}
)
_SCORING = ('sqrtsoftplus', 'sigmoid', 'softmax')
# The only block of multi-token prediction that these files have.
_MTP_BLOCK = 'window'


def _fits(config: TransformerConfig) -> bool:
  """Returns whether a model has V4's attention."""
  return type(config.attention) is SharedKVConfig


def _parse(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns layers, ropes and what else `mapped` doesn't give."""
  scoring = fields.get('scoring_func', _SCORING[0])
  if scoring not in _SCORING:
    raise error('scoring_func', scoring, f'must be one of {_SCORING}')
  tokens = v4_layers.rates(fields)
  names = v4_layers.kinds(fields, config_fields.layers(fields), tokens)
  head_dim = values['attention.head_dim']
  rope_dim = v4_layers.rope_dim(fields, head_dim)
  near, far = v4_layers.ropes(fields, head_dim, rope_dim)
  return {
    'layout': config_fields.compact(names),
    'kinds': v4_kinds(values['vocab_size']),
    'attention.kind': 'sharedkv',
    'attention.rope_dim': rope_dim,
    'attention.rope': near,
    'attention.compress_rope': far,
    'attention.csa.ratio': tokens['csa'],
    'attention.hca.ratio': tokens['hca'],
    'attention.norm_eps': values['norm_eps'],
    'moe.router.scoring': scoring,
    'moe.balance.sequence': 1e-4,
    'residual.kind': 'hyperconnections',
    'residual.norm_eps': values['norm_eps'],
    'mtp.depth': config_fields.integer(fields, 'num_nextn_predict_layers') or 0,
    'mtp.block': _MTP_BLOCK,
    'mtp.streams': True,
  }


def _render(config: TransformerConfig) -> dict[str, Any]:
  """Returns what `mapped` doesn't give; InputError names what has no field."""
  names = [n for pattern, repeat in config.layout for n in pattern * repeat]
  used = {*names, *([config.mtp.block] if config.mtp.depth else [])}
  kinds = v4_kinds(config.vocab_size)
  for name in sorted(used):
    if config.kinds[name] != kinds.get(name):
      raise InputError(
        f'kinds.{name}: not in these files; see presets.v4_kinds'
      )
  _require(config)
  a, far = config.attention, config.attention.compress_rope
  ratio = {'window': 0, 'csa': a.csa.ratio, 'hca': a.hca.ratio}
  plain = [n.removesuffix('_hash') for n in names]
  ffns = ['hash_moe' if n.endswith('_hash') else 'moe' for n in names]
  return {
    **FIXED_FIELDS,
    **rope_json.render(far, v4_layers.ROPES, FAMILY.model_type),
    'rope_theta': a.rope.theta,
    'compress_rope_theta': far.theta,
    'num_key_value_heads': 1,
    'qk_rope_head_dim': a.rope_dim,
    'scoring_func': config.moe.router.scoring,
    'norm_topk_prob': True,
    'topk_method': 'noaux_tc',
    'num_nextn_predict_layers': config.mtp.depth,
    'compress_ratios': [ratio[p] for p in plain] + [0] * config.mtp.depth,
    'layer_types': [v4_layers.TYPES[p] for p in plain],
    'compress_rates': {v4_layers.TYPES[p]: ratio[p] for p in ('csa', 'hca')},
    'mlp_layer_types': ffns,
  }


def _require(config: TransformerConfig) -> None:
  """Raises InputError for settings that files of V4 cannot express."""
  a, router, hc = config.attention, config.moe.router, config.residual
  if not isinstance(hc, HyperConnectionsConfig):
    raise InputError('residual: files of deepseek_v4 have hyper-connections')
  far = a.compress_rope.scaling
  yarn = far is None or (
    isinstance(far, YarnConfig) and far.attention_factor is not None
  )
  for name, value, wanted in (
    ('attention.compress', a.compress, 'none'),
    ('attention.csa.stage', a.csa.stage, 'sparse'),
    ('attention.rope.scaling', a.rope.scaling, None),
    ('attention.rope.interleaved', a.rope.interleaved, True),
    ('attention.compress_rope.interleaved', a.compress_rope.interleaved, True),
    ('attention.compress_rope.scaling (with attention_factor)', yarn, True),
    ('attention.norm_eps', a.norm_eps, config.norm_eps),
    ('residual.norm_eps', hc.norm_eps, config.norm_eps),
    ('moe.router.normalize', router.normalize, True),
    ('moe.router.bias', router.bias, True),
    ('moe.router.groups', router.groups, 1),
    ('moe.limit (a number)', config.moe.limit is not None, True),
  ):
    require(value, name, wanted)
  if config.mtp.depth:
    require(config.mtp.streams, 'mtp.streams', True)
    require(config.mtp.block, 'mtp.block', _MTP_BLOCK)


FAMILY = Family(
  model_type='deepseek_v4',
  architecture='DeepseekV4ForCausalLM',
  about='sharedkv, hyper-connections, mtp by streams',
  fits=_fits,
  mapped=_MAPPED,
  special=_SPECIAL,
  fixed=_FIXED,
  carried=_CARRIED,
  parse=_parse,
  render=_render,
  names=v4_names.NAMES,
  # The released files have norms, sinks and hyper-connections so.
  exact=True,
  # transformers compresses padding into the entries.
  pads_left=False,
  drafter=Drafter(
    'DSpark drafter',
    'dspark_',
    ('main_proj', 'main_norm', 'markov_head', 'confidence_head'),
  ),
)
