"""Trains a part of the parameters; the rest keep their values to the bit.

Frozen parameters get no gradient, no decay and no moments, and don't count in
the gradient norm. The indexer's warm-up trains so (DeepSeek-V3.2,
arXiv:2512.02556, section 2.1.1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.trees import nested


class TrainedPart(NamedTuple):
  """Describes which parameters are trained.

  Attributes:
    abstract: their abstract state, without the rest.
    mask: over all parameters, True where trained.
  """

  abstract: nnx.State
  mask: dict

  def detached(self, params: dict) -> dict:
    """Returns the parameters; no gradient flows to frozen ones."""
    one = lambda p, on: p if on else jax.lax.stop_gradient(p)
    return jax.tree.map(one, params, self.mask)

  def only(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, which was made for `abstract`, for all parameters."""
    inner = optax.with_extra_args_support(inner)

    def init(params: dict) -> Any:
      return inner.init(_kept(params, self.mask))

    def update(
      grads: dict, state: Any, params: dict | None = None, **more: Any
    ) -> tuple[dict, Any]:
      some = lambda tree: None if tree is None else _kept(tree, self.mask)
      # The inner rule never meets a frozen leaf, so it keeps no moment of one.
      moved, state = inner.update(some(grads), state, some(params), **more)
      return _spread(moved, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def check(abstract: nnx.State, names: tuple[str, ...]) -> None:
  """Raises InputError when no parameter has one of the names in its path."""
  paths = list(_flat(abstract))
  for name in names:
    if not any(name in path for path in paths):
      known = sorted({k for path in paths for k in path if isinstance(k, str)})
      raise InputError(
        f'trainable = {names!r}: no parameter has {name!r} in its path; names'
        f' are {known}'
      )


def part(abstract: nnx.State, names: tuple[str, ...]) -> TrainedPart:
  """Returns the parameters with one of `names` in their path."""
  flat = _flat(abstract)
  on = {path: any(n in path for n in names) for path in flat}
  kept = {path: v for path, v in flat.items() if on[path]}
  return TrainedPart(type(abstract)(nested(kept)), nested(on))


def still(
  inner: optax.GradientTransformation, names: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` without updates of parameters named in their path.

  For what an objective leaves alone: no gradient reaches it, but weight decay
  would.
  """
  inner = optax.with_extra_args_support(inner)

  def update(
    grads: dict, state: Any, params: dict | None = None, **more: Any
  ) -> tuple[dict, Any]:
    moved, state = inner.update(grads, state, params, **more)

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
      keys = [getattr(entry, 'key', None) for entry in path]
      held = any(name in keys for name in names)
      return jnp.zeros_like(leaf) if held else leaf

    return jax.tree.map_with_path(one, moved), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _flat(abstract: nnx.State) -> dict[tuple, nnx.Variable]:
  """Returns {path: variable} of an abstract state."""
  leaf = lambda v: isinstance(v, nnx.Variable)
  return {
    tuple(entry.key for entry in path): variable
    for path, variable in jax.tree.leaves_with_path(abstract, is_leaf=leaf)
  }


def _kept(tree: dict, mask: dict) -> dict:
  """Returns the tree without frozen leaves and dicts that they leave empty."""
  out: dict[Any, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      inner = _kept(value, mask[key])
      if inner:
        out[key] = inner
    elif mask[key]:
      out[key] = value
  return out


def _spread(some: dict, whole: dict) -> dict:
  """Returns the leaves of `whole`: those in `some`, zeros for the others."""
  out = {}
  for key, value in whole.items():
    if isinstance(value, dict):
      out[key] = _spread(some.get(key, {}), value)
    else:
      out[key] = some[key] if key in some else jnp.zeros_like(value)
  return out
