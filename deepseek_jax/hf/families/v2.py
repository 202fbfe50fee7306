"""Defines DeepSeek-V2: latent attention, experts by softmax."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.hf import rope_json
from deepseek_jax.hf.config_fields import needed
from deepseek_jax.hf.config_limits import error
from deepseek_jax.hf.families import latent
from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.families.plain import require, require_router
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.transformer_config import TransformerConfig


def _fits(config: TransformerConfig) -> bool:
  """Returns whether a model has latent attention and experts by softmax."""
  latents = type(config.attention) is MLAConfig
  return latents and bool(config.moe and config.moe.router.scoring == 'softmax')


def _parse(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns attention, rope, layout and router."""
  return latent.without_unused(
    values,
    {
      **latent.parse(fields, values, mtp=0),
      'attention.kind': 'mla',
      'attention.rope': rope_json.parse(fields, latent.ROPES, interleaved=True),
      **_router(fields, values),
    },
  )


def _router(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns the router's fields: softmax, greedy or limited by groups."""
  method = fields.get('topk_method', 'greedy')
  if method not in ('greedy', 'group_limited_greedy'):
    raise error('topk_method', method, 'must be greedy or group_limited_greedy')
  grouped = method == 'group_limited_greedy'
  out = {
    'moe.router.scoring': 'softmax',
    'moe.router.bias': False,
    'moe.router.group_score': 'max',
    'moe.router.groups': needed(fields, 'n_group') if grouped else 1,
    'moe.router.top_groups': needed(fields, 'topk_group') if grouped else 1,
  }
  # V2's released code normalises in place of scaling, and only above one
  # expert; transformers reads the field and ignores it.
  if values['moe.router.normalize']:
    one = values['moe.top_k'] == 1
    out['moe.router.normalize'] = not one
    out['moe.router.scale'] = values['moe.router.scale'] if one else 1.0
  return out


def _render(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields of layers, rope and router."""
  out = latent.render(config)
  router, rope = config.moe.router, config.attention.rope
  require_router(router, bias=False)
  require(config.mtp.depth, 'mtp.depth', 0)
  require(rope.interleaved, 'attention.rope.interleaved', True)
  if router.normalize:
    # One weight divided by itself is 1; these files leave it as it is.
    one = config.moe.top_k == 1
    require(one, 'moe.router.normalize with moe.top_k = 1', False)
    require(router.scale, 'moe.router.scale', 1.0)
  grouped = router.groups > 1
  if grouped:
    require(router.group_score, 'moe.router.group_score', 'max')
  return {
    **out,
    **rope_json.render(rope, latent.ROPES, FAMILY.model_type),
    'scoring_func': 'softmax',
    'topk_method': 'group_limited_greedy' if grouped else 'greedy',
    'n_group': router.groups,
    'topk_group': router.top_groups,
  }


FAMILY = Family(
  model_type='deepseek_v2',
  architecture='DeepseekV2ForCausalLM',
  about='mla, experts by softmax',
  fits=_fits,
  mapped=latent.MAPPED,
  special=latent.SPECIAL | {'topk_method'},
  fixed=latent.FIXED | {'scoring_func': ('softmax',)},
  parse=_parse,
  render=_render,
  names=latent.NAMES,
)
