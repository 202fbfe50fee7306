"""Defines DeepSeek-V3: latent attention, experts by sigmoid and bias, MTP.

R1, V3.1, Moonlight and Kimi-K2 are V3 with other numbers.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import rope_json
from deepseek_jax.hf.config_fields import integer, needed
from deepseek_jax.hf.config_limits import error
from deepseek_jax.hf.families import latent
from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.families.plain import require_router
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.transformer_config import TransformerConfig

_DEPTHS = ('num_nextn_predict_layers', 'num_mtp_layers')
SPECIAL = latent.SPECIAL | {*_DEPTHS}
FIXED = latent.FIXED | {
  'scoring_func': ('sigmoid',),
  'topk_method': ('noaux_tc',),
}
# The MoE fields that a file needs, where no layer has experts.
_NO_MOE = {
  'n_routed_experts': 2,
  'num_experts_per_tok': 1,
  'moe_intermediate_size': 1,
  'n_shared_experts': 1,
  'routed_scaling_factor': 1.0,
  'norm_topk_prob': True,
  'n_group': 1,
  'topk_group': 1,
}


def _fits(config: TransformerConfig) -> bool:
  """Returns whether a model has latent attention; V2 has taken its own."""
  return type(config.attention) is MLAConfig


def parse(
  fields: Mapping[str, Any],
  values: Mapping[str, Any],
  *,
  kind: str,
  kinds: tuple[str, ...],
) -> dict[str, Any]:
  """Returns attention, rope, layout, MTP and router.

  Args:
    fields: of the file.
    values: of the mapped fields.
    kind: of the attention.
    kinds: of scaled rope that the family has.
  """
  depths = {integer(fields, n) or 0 for n in _DEPTHS if n in fields}
  if len(depths) > 1:
    raise error(_DEPTHS[0], fields[_DEPTHS[0]], f'contradicts {_DEPTHS[1]}')
  interleaved = fields.get('rope_interleave', True)
  if type(interleaved) is not bool:
    raise error('rope_interleave', interleaved, 'must be true or false')
  return latent.without_unused(
    values,
    {
      **latent.parse(fields, values, mtp=depths.pop() if depths else 0),
      'attention.kind': kind,
      'attention.rope': rope_json.parse(fields, kinds, interleaved=interleaved),
      'moe.router.scoring': 'sigmoid',
      'moe.router.bias': True,
      'moe.router.group_score': 'top2',
      'moe.router.groups': needed(fields, 'n_group'),
      'moe.router.top_groups': needed(fields, 'topk_group'),
    },
  )


def _parse(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns all that `mapped` doesn't give."""
  return parse(fields, values, kind='mla', kinds=latent.ROPES)


def render(
  config: TransformerConfig, kinds: tuple[str, ...], model_type: str
) -> dict[str, Any]:
  """Returns the fields of layers, rope, MTP and router.

  Args:
    config: of the model.
    kinds: of scaled rope that the family has.
    model_type: of the family.
  """
  rope, moe = config.attention.rope, config.moe
  out = {
    **latent.render(config),
    **rope_json.render(rope, kinds, model_type),
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'rope_interleave': rope.interleaved,
    'num_nextn_predict_layers': config.mtp.depth,
  }
  if moe is None:
    return out | _NO_MOE
  require_router(moe.router, scoring='sigmoid', bias=True, group_score='top2')
  if moe.experts // moe.router.groups < 2:
    raise InputError(f'moe.experts: {model_type} needs two experts in a group')
  groups = {'n_group': moe.router.groups, 'topk_group': moe.router.top_groups}
  return out | groups


def _render(config: TransformerConfig) -> dict[str, Any]:
  """Returns all that `mapped` doesn't give."""
  return render(config, latent.ROPES, FAMILY.model_type)


FAMILY = Family(
  model_type='deepseek_v3',
  architecture='DeepseekV3ForCausalLM',
  # Serving software distinguishes models by them; they are written as V3.
  aliases=('kimi_k2',),
  about='mla, dense layers or experts by sigmoid with a bias, mtp',
  fits=_fits,
  mapped=latent.MAPPED,
  special=SPECIAL | {'rope_interleave'},
  fixed=FIXED,
  parse=_parse,
  render=_render,
  names=latent.NAMES,
)
