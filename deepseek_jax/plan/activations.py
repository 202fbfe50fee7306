"""Bytes that a block keeps for its backward pass, read off its own program.

The block is differentiated on shapes alone; what the backward pass reads and
what depends on the block's input is an activation, the rest are weights. So
any attention and any policy is counted as it is, before XLA fuses anything.
Legend: T tokens, D model.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from deepseek_jax.model.block import Block, BlockConfig
from deepseek_jax.model.context import Context
from deepseek_jax.model.transformer import TransformerConfig
from deepseek_jax.parallel.sharding import Buffer


class Kept(NamedTuple):
  """Bytes of one block and one sequence between forward and backward.

  Attributes:
    none: nothing is recomputed.
    dots: the outputs of plain matmuls are kept.
    full: just the block's input is kept.
  """

  none: int
  dots: int
  full: int


# Of an attention and what it is made of: what rules of heads cut.
_HEADS = ('heads', 'kv_heads', 'groups', 'index_heads')


def _cut(config, names: tuple[str, ...], ways: int):
  """A config with fields of these names divided, in those inside it too."""
  changes = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in names:
      changes[field.name] = -(-value // ways)
    elif dataclasses.is_dataclass(value):
      changes[field.name] = _cut(value, names, ways)
  return dataclasses.replace(config, **changes)


def on_device(block: BlockConfig, tensor: int) -> BlockConfig:
  """What one of `tensor` devices works on: its heads and hidden numbers.

  What lies between, such as a block's input and latents, is whole on each.
  """
  if tensor == 1:
    return block
  return dataclasses.replace(
    block,
    attention=_cut(block.attention, _HEADS, tensor),
    ffn=dataclasses.replace(block.ffn, width=-(-block.ffn.width // tensor)),
  )


def _depends(jaxpr, first: int) -> list[bool]:
  """For each output, whether it depends on the inputs from `first` on."""
  tainted = set(jaxpr.invars[first:])
  for eqn in jaxpr.eqns:
    inputs = (v for v in eqn.invars if isinstance(v, core.Var))
    if any(v in tainted for v in inputs):
      tainted.update(eqn.outvars)
  return [isinstance(v, core.Var) and v in tainted for v in jaxpr.outvars]


def _bytes(aval) -> int:
  return math.prod(aval.shape) * aval.dtype.itemsize


def _rows(block: BlockConfig, length: int):
  """Rows of a memory's tables, of any tokens; None without a memory."""
  if block.engram is None:
    return None
  each = (block.engram.longest - 1) * block.engram.heads
  return jnp.zeros((1, length, 1, each), jnp.int32)


def _block_function(block: BlockConfig, dim: int, dtype):
  """(f(params, x), abstract params): the block on one fresh sequence."""
  make = lambda key: Block(block, dim, std=1.0, rngs=nnx.Rngs(key))
  made = jax.eval_shape(make, jax.random.key(0))
  graphdef, params, buffers = nnx.split(made, nnx.Param, Buffer)
  params, buffers = map(nnx.to_pure_dict, (params, buffers))
  cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))

  def f(params, x):
    index = jnp.arange(x.shape[1])[None]
    ctx = Context(index, index, None, True, rows=_rows(block, x.shape[1]))
    zeros = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), buffers)
    return nnx.merge(graphdef, cast(params), zeros)(x, ctx)[0]

  return f, params


@functools.cache
def block_activations(
  block: BlockConfig, dim: int, length: int, dtype: str
) -> Kept:
  """Activations of one block on one sequence of `length` tokens.

  Args:
    block: attention, FFN and residual.
    dim: D of the model.
    length: T; over 16, so that experts take tokens as in training.
    dtype: of activations.
  """
  f, params = _block_function(block, dim, jnp.dtype(dtype))
  x = jax.ShapeDtypeStruct((1, length, dim), dtype)
  x = jax.eval_shape(block.residual.expand, x)
  weights = len(jax.tree.leaves(params))

  def kept(f) -> int:
    saved = lambda params, x: jax.tree.leaves(jax.vjp(f, params, x)[1])
    jaxpr = jax.make_jaxpr(saved)(params, x).jaxpr
    # One value under several names is one buffer.
    mine = {
      v: _bytes(v.aval)
      for v, hit in zip(jaxpr.outvars, _depends(jaxpr, weights))
      if hit
    }
    return sum(mine.values())

  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return Kept(kept(f), kept(jax.checkpoint(f, policy=dots)), _bytes(x))


def kept_bytes(
  config: TransformerConfig, block: BlockConfig, length: int, tensor: int = 1
) -> Kept:
  """`block_activations` in a model's compute dtype, on one of the devices that
  split its heads."""
  block = on_device(block, tensor)
  return block_activations(block, config.dim, length, config.compute.dtype)
