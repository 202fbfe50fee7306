"""Defines DeepSeek-V3.2: V3 with an indexer that picks what is attended to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf.config_fields import Field
from deepseek_jax.hf.config_limits import error, shown
from deepseek_jax.hf.families import latent, v3
from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.rows import Row
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.transformer_config import TransformerConfig

_ROPES = ('default', 'yarn')
# The released files have all three, and compress queries.
_MAPPED = latent.MAPPED | {
  'q_lora_rank': Field('attention.q_rank', int),
  'index_n_heads': Field('attention.indexer.heads', int),
  'index_head_dim': Field('attention.indexer.dim', int),
  'index_topk': Field('attention.top_k', int),
}
# transformers writes the kinds of its layers, too.
_LAYERS = {'mlp_layer_types', 'layer_types'}
_INDEXER = (
  Row('attention.indexer.q', 'self_attn.indexer.wq_b.weight', 1),
  Row('attention.indexer.k', 'self_attn.indexer.wk.weight', 1),
  Row('attention.indexer.k_norm.scale', 'self_attn.indexer.k_norm.weight'),
  Row('attention.indexer.k_norm.bias', 'self_attn.indexer.k_norm.bias'),
  Row(
    'attention.indexer.weights',
    'self_attn.indexer.weights_proj.weight',
    1,
    fp8=False,
  ),
)


def _block_rows(block: BlockConfig) -> tuple[Row, ...]:
  """Returns the table of one layer."""
  return (*latent.block_rows(block), *_INDEXER)


def _fits(config: TransformerConfig) -> bool:
  """Returns whether a model has latent attention with an indexer."""
  return type(config.attention) is DSAConfig


def _parse(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns all that `mapped` doesn't give, after checking kinds of layers."""
  layers, dense = latent.counts(fields)
  wanted = {
    'mlp_layer_types': ['dense'] * dense + ['sparse'] * (layers - dense),
    'layer_types': ['indexed_attention'] * layers,
  }
  for name, value in wanted.items():
    if fields.get(name) not in (None, value):
      fix = f'not supported; must be {shown(value)}'
      raise error(name, fields[name], fix)
  return v3.parse(fields, values, kind='dsa', kinds=_ROPES)


def _render(config: TransformerConfig) -> dict[str, Any]:
  """Returns all that `mapped` doesn't give."""
  _check(config.attention)
  return v3.render(config, _ROPES, FAMILY.model_type)


def _check(attention: DSAConfig) -> None:
  """Raises InputError for what these files cannot express."""
  fixed = {
    'stage': 'sparse',
    'indexer.interleaved': False,
    'indexer.norm_eps': 1e-6,
    'indexer.blocks': None,
    'rope.interleaved': True,
  }
  for path, wanted in fixed.items():
    value = attention
    for key in path.split('.'):
      value = getattr(value, key)
    if value != wanted:
      raise InputError(
        f'attention.{path} = {value!r}: files of {FAMILY.model_type} know only'
        f' {wanted!r}'
      )
  if attention.q_rank is None:
    raise InputError(
      f'attention.q_rank = None: files of {FAMILY.model_type} compress queries;'
      ' give a rank'
    )


FAMILY = Family(
  model_type='deepseek_v32',
  architecture='DeepseekV32ForCausalLM',
  about='dsa, as deepseek_v3',
  fits=_fits,
  mapped=_MAPPED,
  special=v3.SPECIAL | _LAYERS,
  fixed=v3.FIXED | {'rope_interleave': (True,)},
  parse=_parse,
  render=_render,
  names=dataclasses.replace(latent.NAMES, block=_block_rows),
)
