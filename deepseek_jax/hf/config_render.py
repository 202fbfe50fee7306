"""Renders a TransformerConfig as config.json.

What no family of files can express is an error that names the field of ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields as fields_of
from deepseek_jax.hf import rope_json
from deepseek_jax.hf.families import v4 as v4_config
from deepseek_jax.hf.families import v4_names, v32
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.residual import ResidualConfig
from deepseek_jax.model.transformer_config import TransformerConfig


def render(
  config: TransformerConfig, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the config.json of a model; `carried` adds fields of CARRIED.

  Raises InputError naming the field of ours that no family can express.
  """
  carried = dict(carried or {})
  v4 = v4_names.is_v4(config)
  for name in carried:
    if not fields_of.is_carried(name) and not (
      v4 and name in v4_config.CARRIED
    ):
      raise InputError(
        f'{name}: not one of the fields {sorted(fields_of.CARRIED)}'
      )
  if v4:
    return v4_config.render(config) | carried
  blocks = [b for s in config.segments() for b in s.blocks * s.repeat]
  family = _family(config, blocks)
  dense = _leading_dense(blocks)
  at = {f.ours: name for name, f in fields_of.MAPPED[family].items()}
  out = {
    'model_type': family,
    'architectures': [fields_of.ARCHITECTURES[family]],
  }
  for path, name in at.items():
    value = _reach(config, path)
    if value is not fields_of.REQUIRED:
      out[name] = value
  out['num_hidden_layers'] = len(blocks)
  out |= rope_json.render(config.attention.rope, family)
  out |= {'hidden_act': 'silu', 'attention_bias': False}
  if family == 'llama':
    out['num_key_value_heads'] = config.attention.kv_heads
    out['head_dim'] = config.attention.head_dim
    out['mlp_bias'] = False
  else:
    out |= _latent_fields(config, family, dense)
  return out | carried


def _reach(config: TransformerConfig, path: str) -> Any:
  """Returns the value at a dotted path, REQUIRED where a part of it is None."""
  for key in path.split('.'):
    if config is None:
      return fields_of.REQUIRED
    config = getattr(config, key)
  return config


def _family(config: TransformerConfig, blocks: Sequence[BlockConfig]) -> str:
  """Returns the family whose files express the model.

  Raises:
    InputError: names the field that no family expresses.
  """
  for i, block in enumerate(blocks):
    if block.attention != config.attention:
      raise InputError(f'layer {i}: its attention differs; not in these files')
    if block.residual != ResidualConfig():
      raise InputError(f'layer {i}: residual: not in these files')
    if block.norm_eps != config.norm_eps:
      raise InputError(f'layer {i}: norm_eps differs; not in these files')
  if not isinstance(config.attention, MLAConfig):
    if any(isinstance(b.ffn, MoEConfig) for b in blocks) or config.mtp.depth:
      raise InputError(
        'attention = gqa with moe or mtp: no Hugging Face family supported here'
        ' has both; use mla'
      )
    return 'llama'
  if config.attention.norm_eps != 1e-6:
    raise InputError(
      f'attention.norm_eps = {config.attention.norm_eps}: the released models'
      ' fix it to 1e-6'
    )
  softmax = config.moe and config.moe.router.scoring == 'softmax'
  if isinstance(config.attention, DSAConfig):
    v32.check_ours(config.attention)
    if softmax:
      _require('softmax', 'moe.router.scoring', 'sigmoid')
    return v32.FAMILY
  return 'deepseek_v2' if softmax else 'deepseek_v3'


def _leading_dense(blocks: Sequence[BlockConfig]) -> int:
  """Returns how many dense layers come first; InputError if more follow."""
  dense = [isinstance(b.ffn, FFNConfig) for b in blocks]
  count = dense.index(False) if False in dense else len(dense)
  if any(dense[count:]):
    raise InputError('layout: a dense layer follows a moe layer: not supported')
  for kind in (blocks[:count], blocks[count:]):
    if any(b.ffn != kind[0].ffn for b in kind):
      raise InputError('layout: layers of one kind differ in their ffn')
  return count


def _latent_fields(config: TransformerConfig, family: str, dense: int) -> dict:
  """Returns the fields of latent attention and mixture of experts."""
  out = {
    'num_key_value_heads': config.attention.heads,
    'first_k_dense_replace': dense,
    'moe_layer_freq': 1,
  }
  moe = config.moe
  if config.ffn is None:
    out['intermediate_size'] = moe.width  # of no layer, but a needed field
  if family == 'deepseek_v2':
    return out | _v2_fields(config)
  interleaved = config.attention.rope.interleaved
  out |= {
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'rope_interleave': interleaved,
    'num_nextn_predict_layers': config.mtp.depth,
  }
  if moe is None:
    return out | _no_moe()
  _require(moe.router.bias, 'moe.router.bias', True)
  _require(moe.router.group_score, 'moe.router.group_score', 'top2')
  groups = {'n_group': moe.router.groups, 'topk_group': moe.router.top_groups}
  if moe.experts // moe.router.groups < 2:
    raise InputError('moe.experts: deepseek_v3 needs two experts in a group')
  return out | groups


def _v2_fields(config: TransformerConfig) -> dict:
  """Returns the router fields of V2."""
  router = config.moe.router
  _require(router.bias, 'moe.router.bias', False)
  _require(config.mtp.depth, 'mtp.depth', 0)
  _require(
    config.attention.rope.interleaved, 'attention.rope.interleaved', True
  )
  if router.normalize and config.moe.top_k > 1:
    _require(router.scale, 'moe.router.scale', 1.0)
  grouped = router.groups > 1
  if grouped:
    _require(router.group_score, 'moe.router.group_score', 'max')
  return {
    'scoring_func': 'softmax',
    'topk_method': 'group_limited_greedy' if grouped else 'greedy',
    'n_group': router.groups,
    'topk_group': router.top_groups,
  }


def _no_moe() -> dict:
  """Returns the MoE fields that a deepseek_v3 file needs without MoE layers."""
  return {
    'n_routed_experts': 2,
    'num_experts_per_tok': 1,
    'moe_intermediate_size': 1,
    'n_shared_experts': 1,
    'routed_scaling_factor': 1.0,
    'norm_topk_prob': True,
    'n_group': 1,
    'topk_group': 1,
  }


def _require(value: Any, name: str, wanted: Any) -> None:
  """Raises InputError unless a field has the only value of the family."""
  if value != wanted:
    raise InputError(
      f'{name} = {value!r}: files of this family know only {wanted!r}'
    )
