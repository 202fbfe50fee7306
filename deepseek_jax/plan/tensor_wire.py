"""What tensor parallelism sums over devices, by kind of layer.

A matrix that is cut along what it sums over leaves a part of the sum on each
device (the output projection, the second matrix of an FFN); one that is cut
along what it makes leaves a part of its input's gradient on each. Both are
all-reduced, once per layer and pass where one product makes all that is cut.
Legend: D model, Q query latent, C key-value latent, R rope dim.
"""

import functools

from deepseek_jax.layers.block import BlockConfig
from deepseek_jax.layers.mla import MLAConfig
from deepseek_jax.layers.moe import MoEConfig


@functools.singledispatch
def backward(attention, dim: int) -> int:
  """Numbers of a token that attention's inputs get back from each device."""
  return dim


@backward.register
def _latents(attention: MLAConfig, dim: int) -> int:
  # Latents are whole on every device; what is made of them is cut.
  a = attention
  return (a.q_rank or dim) + a.kv_rank + a.rope_dim


def layer_sums(block: BlockConfig, dim: int, forward: int) -> tuple[int, int]:
  """Numbers of a token that one layer sums over devices in a step.

  Args:
    block: of the layer.
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
