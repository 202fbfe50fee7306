"""Checks and renders what pre-norm models of plain layers have in common.

They have one attention in all layers, one residual stream, and layers that are
dense or have experts.
"""

from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.residual import ResidualConfig
from deepseek_jax.model.transformer_config import TransformerConfig


def has_experts(config: TransformerConfig) -> bool:
  """Returns whether any layer is a mixture of experts."""
  blocks = [b for s in config.segments() for b in s.blocks]
  return any(isinstance(b.ffn, MoEConfig) for b in blocks)


def expert_layers(config: TransformerConfig) -> list[bool]:
  """Returns which layers have experts, after checking them all.

  Raises:
    InputError: a layer, or that of multi-token prediction, departs from the
      model's sub-configs. A file has one set of numbers for all of them.
  """
  blocks = [b for s in config.segments() for b in s.blocks * s.repeat]
  for i, block in enumerate(blocks):
    _check_block(config, block, f'layer {i}')
  if config.mtp.depth:
    block = config.block(config.mtp.block)
    _check_block(config, block, f'mtp.block = {config.mtp.block!r}')
    if not isinstance(block.ffn, MoEConfig):
      raise InputError(
        f'mtp.block = {config.mtp.block!r}: is dense; in these files it has'
        ' experts'
      )
  return [isinstance(b.ffn, MoEConfig) for b in blocks]


def _check_block(
  config: TransformerConfig, block: BlockConfig, where: str
) -> None:
  """Raises InputError unless a block is made of the model's sub-configs."""
  if block.attention != config.attention:
    raise InputError(f'{where}: its attention differs; not in these files')
  if block.residual != ResidualConfig():
    raise InputError(f'{where}: residual: not in these files')
  if block.norm_eps != config.norm_eps:
    raise InputError(f'{where}: norm_eps differs; not in these files')
  if block.engram is not None:
    raise InputError(f'{where}: engram: not in these files')
  name = 'ffn' if isinstance(block.ffn, FFNConfig) else 'moe'
  if block.ffn != getattr(config, name):
    raise InputError(f'{where}: its {name} differs; not in these files')
  require(block.ffn.limit, f'{name}.limit', None)


def leading_dense(experts: list[bool]) -> int:
  """Returns how many dense layers come first; InputError if more follow.

  Args:
    experts: which layers have experts.
  """
  count = experts.index(True) if True in experts else len(experts)
  if not all(experts[count:]):
    raise InputError('layout: a dense layer follows a moe layer: not supported')
  return count


def require(value: Any, name: str, wanted: Any) -> None:
  """Raises InputError unless a field has the only value of the family."""
  if value != wanted:
    raise InputError(
      f'{name} = {value!r}: files of this family know only {wanted!r}'
    )


def require_router(router: RouterConfig, **wanted: Any) -> None:
  """Raises InputError unless a router has the family's settings."""
  for name, value in {'hash_vocab': 0, **wanted}.items():
    require(getattr(router, name), f'moe.router.{name}', value)


def dense_width(config: TransformerConfig) -> dict[str, int]:
  """Returns intermediate_size where no layer is dense: files need it."""
  return {} if config.ffn else {'intermediate_size': config.moe.width}


FIXED_FIELDS = {'hidden_act': 'silu', 'attention_bias': False}
