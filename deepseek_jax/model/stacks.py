"""Makes, reads and takes apart the stacks in which a model keeps its layers.

Every array of a segment's block is stacked over the repeats: [repeat ...].
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError, told
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer_config import TransformerConfig


def empty_cache(
  config: TransformerConfig,
  dtype: jnp.dtype,
  batch: int,
  slots: int,
  spare: int,
) -> Cache:
  """Returns a cache that holds no token yet, for rows of `slots` tokens."""
  if spare < 0:
    raise InputError(f'spare = {spare}: must be at least 0')
  held = jnp.float8_e4m3fn if config.compute.cache == 'float8' else dtype
  layers = []
  for segment in config.segments():
    one = lambda b: b.cache(batch, slots, config.dim, dtype, spare, held)
    empty = [one(b) for b in segment.blocks]
    # As the weights: every array of a segment is stacked [repeat ...].
    stack = lambda a, n=segment.repeat: jnp.zeros((n, *a.shape), a.dtype)
    layers.append(tuple(jax.tree.map(stack, empty)))
  recent = None
  if config.engram_layers():
    recent = jnp.zeros((batch, config.engram.longest + spare), jnp.int32)
  length = jnp.zeros(batch, jnp.int32)
  return Cache(tuple(layers), length, slots, recent=recent)


def unstack(
  config: TransformerConfig, variables: dict | None = None
) -> TransformerConfig | dict:
  """Returns the same model with every layer a segment of its own.

  Decoding wants it: taking a layer out of a stack copies its weights.

  Args:
    config: a model's configuration.
    variables: its variables, to be taken apart too.

  Returns:
    The new configuration, or the new variables if `variables` are given.
  """
  if variables is None:
    names = [n for names, repeat in config.layout for n in names * repeat]
    layout = tuple(((name,), 1) for name in names)
    return dataclasses.replace(config, layout=layout)

  def apart(tree: dict) -> dict:
    if 'segments' not in tree:
      return tree
    layers = {}
    for layer in config.in_order():
      stack, r = layer.of(tree), layer.repeat
      if stack is not None:  # a dense block has no buffers
        one = jax.tree.map(lambda a, r=r: a[r : r + 1], stack)
        layers[layer.number] = {0: one}
    return {**tree, 'segments': layers}

  return {kind: apart(tree) for kind, tree in variables.items()}


def moe_statistics(aux: dict, name: str) -> jax.Array | None:
  """Returns one MoE statistic of all layers in order, [L_moe, ...].

  None without MoE layers. `aux` is that of an Output.

  Raises:
    InputError: the layers have no statistic of that name.
  """
  if not isinstance(aux, Mapping) or 'segments' not in aux:
    raise InputError(f'aux: is {told(aux)}; give the aux of an Output, out.aux')
  layers = [s['ffn'] for patterns in aux['segments'] for s in patterns]
  known = sorted({key for layer in layers for key in layer})
  if known and name not in known:
    raise InputError(f'name = {name!r}: must be one of {known}')
  out = []
  for patterns in aux['segments']:
    picked = [s['ffn'][name] for s in patterns if name in s['ffn']]
    if picked:
      stacked = jnp.stack(picked, axis=1)  # [repeat, blocks, ...]
      out.append(stacked.reshape(-1, *stacked.shape[2:]))
  return jnp.concatenate(out) if out else None
