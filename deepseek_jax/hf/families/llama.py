"""Defines Llama 3 and what has its form: grouped queries, dense layers."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.hf import config_fields, rope_json
from deepseek_jax.hf.families import grouped, plain
from deepseek_jax.hf.families.family import Family, Names
from deepseek_jax.hf.rows import ROOT
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.presets import layout

_ROPES = ('default', 'llama3', 'linear')


def _fits(config: TransformerConfig) -> bool:
  """Returns whether a model has grouped queries and dense layers alone."""
  return grouped.fits(config, qk_norm=False, experts=False)


def _parse(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns attention, rope and layout."""
  return {
    **config_fields.heads(fields, values),
    'attention.rope': rope_json.parse(fields, _ROPES, interleaved=False),
    'layout': layout(config_fields.layers(fields), 0),
  }


def _render(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields of attention and rope."""
  plain.expert_layers(config)
  return grouped.render(config, _ROPES, FAMILY.model_type) | {'mlp_bias': False}


FAMILY = Family(
  model_type='llama',
  architecture='LlamaForCausalLM',
  about='gqa, dense layers',
  fits=_fits,
  mapped=grouped.MAPPED,
  special=grouped.SPECIAL,
  fixed=grouped.FIXED,
  parse=_parse,
  render=_render,
  names=Names(root=ROOT, block=grouped.block_rows),
)
