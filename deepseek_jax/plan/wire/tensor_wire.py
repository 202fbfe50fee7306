"""Counts what tensor parallelism sums over devices, by kind of layer.

A matrix that is sharded along its inputs (row-wise) leaves a part of the sum on
each device (the output projection, the second matrix of an FFN); one that is
sharded along its outputs (column-wise) leaves a part of its input's gradient on
each. Both are all-reduced, once per layer and pass where one product makes all
that is sharded. Sparse and shared attentions sum more inside, which is not
known: `uncounted`. Legend: D model, Q query latent, C key-value latent, R rope
dim.
"""

from typing import Any

from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan.flops import blocks


def backward(attention: Any, dim: int) -> int:
  """Returns the numbers per token of input gradients that attention
  all-reduces.

  0 where that is not known. The exact type decides: DSA is an MLA that sums
  more.
  """
  if type(attention) is GQAConfig:
    return dim
  if type(attention) is MLAConfig:
    # Latents are unsharded; what is projected from them is sharded by head.
    return (attention.q_rank or dim) + attention.kv_rank + attention.rope_dim
  return 0


def uncounted(config: TransformerConfig) -> tuple[str, ...]:
  """Returns the attentions whose inner sums are not counted, by name.

  Only their output's sum is.
  """
  made = [block.attention for block, _ in blocks(config)]
  if config.mtp.depth:
    made.append(config.block(config.mtp.block).attention)
  names = (type(a).__name__ for a in made if not backward(a, 1))
  return tuple(dict.fromkeys(names))


def layer_sums(block: BlockConfig, dim: int, forward: int) -> tuple[int, int]:
  """Returns the numbers of a token that one layer all-reduces in a step.

  Args:
    block: configuration of the layer.
    dim: D.
    forward: how often it runs forward.

  Returns:
    Those in the dtype of computing, and those in float32.
  """
  numbers = forward * dim + backward(block.attention, dim)
  ffn, weights = 1, 0
  if isinstance(block.ffn, MoEConfig):
    ffn = 1 + (block.ffn.shared > 0)  # routed and shared experts by themselves
    weights = block.ffn.top_k  # of the routed ones; their gradients
  return numbers + ffn * (forward + 1) * dim, weights
