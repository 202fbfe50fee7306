"""Defines what files of DeepSeek-V3.2 add to those of V3: the indexer.

Here are its fields of config.json, its tensors, and what of ours they cannot
express.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_limits
from deepseek_jax.hf.row import Row
from deepseek_jax.model.attention.dsa import DSAConfig

FAMILY = 'deepseek_v32'
# Field of config.json -> ours. The released files have all three.
FIELDS = {
  'index_n_heads': 'attention.indexer.heads',
  'index_head_dim': 'attention.indexer.dim',
  'index_topk': 'attention.top_k',
}
# transformers writes the kinds of its layers, too.
LAYERS = {'mlp_layer_types', 'layer_types'}
ROWS = (
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


def check_layers(fields: Mapping[str, Any], layers: int, dense: int) -> None:
  """Raises InputError unless kinds of layers follow first_k_dense_replace.

  The message names the field that differs.
  """
  wanted = {
    'mlp_layer_types': ['dense'] * dense + ['sparse'] * (layers - dense),
    'layer_types': ['indexed_attention'] * layers,
  }
  for name, value in wanted.items():
    if fields.get(name) not in (None, value):
      fix = f'not supported; must be {config_limits.shown(value)}'
      raise config_limits.error(name, fields[name], fix)


def check_ours(attention: DSAConfig) -> None:
  """Raises InputError for what these files cannot express."""
  fixed = {
    'stage': 'sparse',
    'indexer.interleaved': False,
    'indexer.norm_eps': 1e-6,
    'rope.interleaved': True,
  }
  for path, wanted in fixed.items():
    value = attention
    for key in path.split('.'):
      value = getattr(value, key)
    if value != wanted:
      raise InputError(
        f'attention.{path} = {value!r}: files of {FAMILY} know only {wanted!r}'
      )
  if attention.q_rank is None:
    raise InputError(
      f'attention.q_rank = None: files of {FAMILY} compress queries; give a'
      ' rank'
    )
