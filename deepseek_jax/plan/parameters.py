"""Counts parameters, total and active per token, from abstract variables."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import lora
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Holds numbers of parameters.

  Router biases and adapters count; multi-token prediction is counted apart.

  Attributes:
    total: of the main model, embedding and head included.
    active: what one token uses of it, embedding and head included.
    embedding: of the embedding matrix.
    head: of the head; 0 when it is the embedding.
    mtp, mtp_active: unique to the multi-token prediction blocks.
  """

  total: int
  active: int
  embedding: int
  head: int
  mtp: int
  mtp_active: int

  @property
  def active_without_embedding(self) -> int:
    """Returns the count that most papers quote as active."""
    return self.active - self.embedding


def count_parameters(config: TransformerConfig) -> ParameterCount:
  """Counts without allocating anything."""
  abstract = build(config).abstract
  size = lambda tree: sum(
    math.prod(a.shape)
    for a in jax.tree.leaves(tree)
    if jnp.issubdtype(a.dtype, jnp.floating)  # a hash table is no parameter
  )
  params, buffers = (
    nnx.to_pure_dict(abstract[k]) for k in ('params', 'buffers')
  )
  mtp = size(params.get('mtp', {})) + size(buffers.get('mtp', {}))
  total = size(params) + size(buffers) - mtp
  idle = sum(
    segment.repeat * _idle(block, config.dim)
    for segment in config.segments()
    for block in segment.blocks
  )
  mtp_idle = 0
  if config.mtp.depth:
    block = config.block(config.mtp.block)
    mtp_idle = config.mtp.depth * _idle(block, config.dim)
  if config.lora is not None:
    of_segments, of_mtp = _idle_adapters(config, abstract['params'])
    idle, mtp_idle = idle + of_segments, mtp_idle + of_mtp
  return ParameterCount(
    total=total,
    active=total - idle,
    embedding=size(params['embed']),
    head=size(params.get('head', {})),
    mtp=mtp,
    mtp_active=mtp - mtp_idle,
  )


def _idle_adapters(
  config: TransformerConfig, params: Mapping
) -> tuple[int, int]:
  """Returns numbers of adapters of experts not chosen: model's and MTP's."""
  idle, segments = {'segments': 0, 'mtp': 0}, config.segments()
  for path, made in lora.adapters(params, config.lora).items():
    if 'experts' not in made.axes[0]:
      continue
    if path[0] == 'segments':
      block = segments[path[1]].blocks[path[2]]
    else:
      block = config.block(config.mtp.block)
    unused = block.ffn.experts - block.ffn.top_k
    both = math.prod(made.a) + math.prod(made.b)
    idle[path[0]] += both // block.ffn.experts * unused
  return idle['segments'], idle['mtp']


def _idle(block: BlockConfig, dim: int) -> int:
  """Returns the parameters that a token leaves idle in a block.

  Those are experts not chosen and Engram rows not read.
  """
  idle, ffn, memory = 0, block.ffn, block.engram
  if block.routed:
    idle += (ffn.experts - ffn.top_k) * 3 * dim * ffn.width
  if memory is not None:
    idle += block.engram_rows * memory.dim // memory.heads - memory.width
  return idle
