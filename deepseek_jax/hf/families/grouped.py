"""Converts what Llama and Qwen3 have in common: grouped queries."""

from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields, rope_json
from deepseek_jax.hf.families import plain
from deepseek_jax.hf.rows import DENSE, GQA, NORMS, QK_NORMS, ROUTED, Row
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer_config import TransformerConfig

SPECIAL = frozenset({'num_key_value_heads', 'head_dim'})
MAPPED = config_fields.COMMON
FIXED = config_fields.FIXED


def fits(config: TransformerConfig, *, qk_norm: bool, experts: bool) -> bool:
  """Returns whether a model has grouped queries, norms and experts so."""
  return (
    type(config.attention) is GQAConfig
    and config.attention.qk_norm == qk_norm
    and plain.has_experts(config) == experts
    and not config.mtp.depth
  )


def block_rows(block: BlockConfig) -> tuple[Row, ...]:
  """Returns the table of one layer."""
  norms = QK_NORMS if block.attention.qk_norm else ()
  ffn = ROUTED if isinstance(block.ffn, MoEConfig) else DENSE
  return (*NORMS, *GQA, *norms, *ffn)


def render(
  config: TransformerConfig, kinds: tuple[str, ...], model_type: str
) -> dict[str, Any]:
  """Returns the fields of attention, rope and dense layers.

  Args:
    config: of the model, whose layers are checked.
    kinds: of scaled rope that the family has.
    model_type: of the family.
  """
  attention = config.attention
  if attention.rope.interleaved:
    raise InputError(
      f'attention.rope.interleaved = True: {model_type} files pair halves; use'
      ' False'
    )
  return {
    **rope_json.render(attention.rope, kinds, model_type),
    **plain.FIXED_FIELDS,
    **plain.dense_width(config),
    'num_key_value_heads': attention.kv_heads,
    'head_dim': attention.head_dim,
  }
