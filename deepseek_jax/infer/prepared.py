"""Lays weights out for decoding: cast once, layers apart, adapters folded in.

A step then reads each weight where it lies. Arrays that are so already stay
what they are; the others are made one by one, so a caller that gives its own
up never has two copies of a model in memory.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import given
from deepseek_jax.model.merging import merged
from deepseek_jax.model.stacks import unstack
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel.sharding import Using, current


def prepare(model: Model, variables: dict, *, donate: bool = False) -> dict:
  """Returns variables as the decode loop wants them: cast once, layers apart.

  `generate` and the others take both forms; prepare once to sample often. What
  needs neither is shared with `variables`: all of it where layers are single
  and in the compute dtype.

  Args:
    model: whose variables; as it trains.
    variables: of the model, prepared or not.
    donate: the caller gives its arrays up. They are then part of the result or
      deleted, each as soon as what is made of it is there: in memory are one
      copy of the model and one of its arrays, a stack of layers at most. The
      result may also share arrays with `variables` that are prepared already.
  """
  given.variables({'params': None, 'buffers': None}, variables)
  if _is_prepared(model, variables):
    return variables
  if donate:
    if model.config.lora is not None:
      model, variables = _folded(model, variables)
    return _apart(model, variables, donate=True)
  like = {kind: nnx.to_pure_dict(v) for kind, v in model.abstract.items()}
  given.variables(like, variables)
  leaves = jax.tree.leaves(variables)
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
  if traced or model.config.lora is not None:
    return _prepare(model, current())(variables)
  return _apart(model, variables, donate=False)


def _is_prepared(model: Model, variables: dict) -> bool:
  """Returns whether variables are as `prepare` returns them."""
  flat = build_flat(model)
  params = variables['params']
  like = nnx.to_pure_dict(flat.abstract['params'])
  if jax.tree.structure(params) != jax.tree.structure(like):
    return False
  # The same tree may still be in float32.
  cast = jax.eval_shape(flat.cast, variables)['params']
  dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
  return dtypes(params) == dtypes(cast)


@functools.lru_cache(maxsize=32)
def build_flat(model: Model) -> Model:
  """Returns the same model, every layer a segment, without adapters.

  Those are folded into the weights once, not at every token.
  """
  return build(dataclasses.replace(unstack(model.config), lora=None))


@functools.lru_cache(maxsize=32)
def _prepare(model: Model, using: Using | None) -> Callable[[dict], dict]:
  """Returns the jitted cast and unstacking of a model's variables."""
  del using  # what is traced depends on it, which jit does not know
  return jax.jit(lambda v: unstack(model.config, model.cast(v)))


def _folded(model: Model, variables: dict) -> tuple[Model, dict]:
  """Returns the model without adapters; deletes the weights they change."""
  config, after = merged(model.config, variables)
  stays = set(map(id, jax.tree.leaves(jax.block_until_ready(after))))
  for leaf in jax.tree.leaves(variables):
    if id(leaf) not in stays:
      _delete(leaf)
  return build(config), after


class _Layers:
  """Holds the layers of a stack; `[r : r + 1]` is one, as of the stack."""

  def __init__(self, each: tuple[jax.Array, ...]):
    """Takes the layers [1 ...]."""
    self._each = each

  def __getitem__(self, at: slice) -> jax.Array:
    """Returns the layer that a slice of one takes."""
    return self._each[at.start]


def _apart(model: Model, variables: dict, *, donate: bool) -> dict:
  """Returns variables cast and taken apart, each array on its own.

  An array that is as the result wants it is part of the result, not copied.
  """
  uses = collections.Counter(map(id, jax.tree.leaves(variables)))
  repeats = {
    (layer.segment, layer.place): segment.repeat
    for layer in model.config.in_order()
    for segment in [model.config.segments()[layer.segment]]
  }

  def one(path: tuple, leaf: Any, dtype: Any) -> Any:
    keys = [entry.key for entry in path]
    stacked = keys[1] == 'segments'
    layers = repeats[keys[2], keys[3]] if stacked else 0
    if leaf.dtype == dtype and layers <= 1:
      leaf = jnp.asarray(leaf)
      return _Layers((leaf,)) if stacked else leaf
    made = _layers(leaf, dtype, layers)
    uses[id(leaf)] -= 1
    if donate and not uses[id(leaf)]:  # the tree may hold an array twice
      jax.block_until_ready(made)
      _delete(leaf)
    return _Layers(made) if stacked else made[0]

  parts = jax.tree_util.tree_map_with_path(one, variables, _dtypes(model))
  return unstack(model.config, parts)


@functools.lru_cache(maxsize=32)
def _dtypes(model: Model) -> dict:
  """Returns the dtypes of a model's variables as it computes with them."""
  like = {kind: nnx.to_pure_dict(v) for kind, v in model.abstract.items()}
  return jax.tree.map(lambda a: a.dtype, jax.eval_shape(model.cast, like))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _layers(leaf: jax.Array, dtype: Any, count: int) -> tuple[jax.Array, ...]:
  """Returns the layers [1 ...] of a stack, cast; count 0: all of an array."""
  leaf = leaf.astype(dtype)
  return tuple(leaf[r : r + 1] for r in range(count)) or (leaf,)


def _delete(leaf: Any) -> None:
  """Deletes an array of a device; what NumPy has is Python's to free."""
  if isinstance(leaf, jax.Array) and not leaf.is_deleted():
    leaf.delete()
