"""Takes a module apart into pure functions over plain nested dicts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import lora
from deepseek_jax.model.lora import LoRAConfig
from deepseek_jax.parallel.sharding import Buffer


class Functional(NamedTuple):
  """Holds a module as pure functions, see `functional`.

  Attributes:
    abstract, init: as in Model.
    cast: variables -> the same in the compute dtype, adapters still apart.
    merge: variables -> module.
    ready: variables -> as `Model.cast`: adapters folded in.
  """

  abstract: dict[str, nnx.State]
  init: Callable[[jax.Array], dict]
  cast: Callable[[dict], dict]
  merge: Callable[[dict], nnx.Module]
  ready: Callable[[dict], dict]


def functional(
  make: Callable[[jax.Array], nnx.Module],
  dtype: jax.typing.DTypeLike,
  adapters: LoRAConfig | None = None,
  first: tuple[int, ...] = (),
) -> Functional:
  """Takes a module apart into functions of plain dicts; allocates no array.

  Args:
    make: key -> module.
    dtype: in which it is computed.
    adapters: of its weights, if any.
    first: see `lora.adapted`.
  """
  # Shapes and dtypes alone: nothing is drawn.
  abstract = jax.eval_shape(make, jax.random.key(0))
  graphdef, params, buffers = nnx.split(abstract, nnx.Param, Buffer)

  def init(key: jax.Array) -> dict:
    _, params, buffers = nnx.split(make(key), nnx.Param, Buffer)
    return {
      'params': nnx.to_pure_dict(params),
      'buffers': nnx.to_pure_dict(buffers),
    }

  is_variable = lambda v: isinstance(v, nnx.Variable)
  # Which parameters stay float32: a tree of bools like the parameters.
  kept = nnx.to_pure_dict(
    jax.tree.map(
      lambda v: v.replace(v.get_metadata().get('full_precision', False)),
      params,
      is_leaf=is_variable,
    )
  )

  def cast(variables: dict) -> dict:
    one = lambda p, keep: p.astype(jnp.float32 if keep else dtype)
    return {**variables, 'params': jax.tree.map(one, variables['params'], kept)}

  def merge(variables: dict) -> nnx.Module:
    return nnx.merge(graphdef, variables['params'], variables['buffers'])

  abstract = {'params': params, 'buffers': buffers}
  made = Functional(abstract, init, cast, merge, ready=cast)
  return made if adapters is None else lora.adapted(made, adapters, first)
