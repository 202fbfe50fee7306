"""Counts bytes that a block keeps for its backward pass.

The block's own program is read: it is differentiated on shapes alone; what the
backward pass reads and what depends on the block's input is an activation, the
rest are weights. So any attention and any policy is counted as it is, before
XLA fuses anything. Legend: T tokens, D model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from deepseek_jax.model.block import Block, BlockConfig
from deepseek_jax.model.context import Context
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel.sharding import Buffer


class Kept(NamedTuple):
  """Holds the bytes of one block and sequence between forward and backward.

  Attributes:
    none: nothing is recomputed.
    dots: the outputs of plain matmuls are kept.
    full: just the block's input is kept.
  """

  none: int
  dots: int
  full: int


# Fields of an attention, or of configs inside it, that the tensor axis shards.
_HEADS = ('heads', 'kv_heads', 'groups', 'index_heads')


def _cut(config: Any, names: tuple[str, ...], ways: int) -> Any:
  """Returns a config with named fields divided by `ways`, nested ones too."""
  changes = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in names:
      changes[field.name] = -(-value // ways)
    elif dataclasses.is_dataclass(value):
      changes[field.name] = _cut(value, names, ways)
  return dataclasses.replace(config, **changes)


def on_device(block: BlockConfig, tensor: int) -> BlockConfig:
  """Returns what one of `tensor` devices computes: its heads, its hidden units.

  Activations between, such as a block's input and latents, are unsharded.
  """
  if tensor == 1:
    return block
  return dataclasses.replace(
    block,
    attention=_cut(block.attention, _HEADS, tensor),
    ffn=dataclasses.replace(block.ffn, width=-(-block.ffn.width // tensor)),
  )


def _depends(jaxpr: core.Jaxpr, first: int) -> list[bool]:
  """Returns for each output whether it depends on inputs from `first` on."""
  tainted = set(jaxpr.invars[first:])
  for eqn in jaxpr.eqns:
    inputs = (v for v in eqn.invars if isinstance(v, core.Var))
    if any(v in tainted for v in inputs):
      tainted.update(eqn.outvars)
  return [isinstance(v, core.Var) and v in tainted for v in jaxpr.outvars]


def _bytes(aval: Any) -> int:
  """Returns the bytes of an abstract array."""
  return math.prod(aval.shape) * aval.dtype.itemsize


def _rows(block: BlockConfig, length: int) -> jax.Array | None:
  """Returns Engram row numbers [1 T 1 N], all 0; None without an Engram."""
  if block.engram is None:
    return None
  each = (block.engram.longest - 1) * block.engram.heads
  return jnp.zeros((1, length, 1, each), jnp.int32)


def _block_function(
  block: BlockConfig, dim: int, dtype: jnp.dtype
) -> tuple[Callable, dict]:
  """Returns (f(params, x), abstract params): the block on a fresh sequence."""
  make = lambda key: Block(block, dim, std=1.0, rngs=nnx.Rngs(key))
  made = jax.eval_shape(make, jax.random.key(0))
  graphdef, params, buffers = nnx.split(made, nnx.Param, Buffer)
  params, buffers = map(nnx.to_pure_dict, (params, buffers))
  cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))

  def f(params: dict, x: jax.Array) -> jax.Array:
    index = jnp.arange(x.shape[1])[None]
    ctx = Context(index, index, None, True, rows=_rows(block, x.shape[1]))
    zeros = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), buffers)
    return nnx.merge(graphdef, cast(params), zeros)(x, ctx)[0]

  return f, params


@functools.cache
def block_activations(
  block: BlockConfig, dim: int, length: int, dtype: str
) -> Kept:
  """Counts the activations of one block on a sequence of `length` tokens.

  Args:
    block: attention, FFN and residual.
    dim: D of the model.
    length: T; over 16, so that experts take tokens as in training.
    dtype: name of the dtype of activations.
  """
  f, params = _block_function(block, dim, jnp.dtype(dtype))
  x = jax.ShapeDtypeStruct((1, length, dim), dtype)
  x = jax.eval_shape(block.residual.expand, x)
  weights = len(jax.tree.leaves(params))

  def kept(f: Callable) -> int:
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
  """Returns `block_activations` in a model's compute dtype.

  Args:
    config: decides width and dtype.
    block: whose activations.
    length: tokens of the sequence.
    tensor: devices that split the heads; the bytes are those on one.
  """
  block = on_device(block, tensor)
  return block_activations(block, config.dim, length, config.compute.products)
