"""Named axes: arrays name their axes, rules map the names to mesh axes.

A parameter carries one logical name per axis ('embed', 'heads', 'experts' ...;
leading axes without a name are layer stacks). `use(mesh, rules)` maps names to
mesh axes while a step is traced; outside of it `shard` is the identity, so
notebooks and tests need no mesh.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.parallel.exchange import ExchangeConfig
from pallas_kernels import target

Rules = Mapping[str, str | tuple[str, ...] | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Using:
  """Holds what `use` makes known to layers.

  Attributes:
    mesh: over which the step runs.
    rules: logical axis -> mesh axes.
    exchange: how tokens reach experts of other devices.
  """

  mesh: Mesh
  rules: Rules
  exchange: ExchangeConfig = ExchangeConfig()

  def spec(
    self, axes: Sequence[str | None], shape: Sequence[int]
  ) -> PartitionSpec:
    """Returns the PartitionSpec of an activation with logical `axes`.

    Mesh axes that do not divide a size are left out, last ones first: one
    token of a cache has nothing to split. Leading axes without a name are
    unsharded.
    """
    stack = len(shape) - len(axes)
    parts = [None] * stack
    for axis, size in zip(axes, shape[stack:]):
      names = self.rules.get(axis) if axis else None
      names = (names,) if isinstance(names, str) else tuple(names or ())
      names = tuple(n for n in names if n in self.mesh.shape)
      while names and size % math.prod(self.mesh.shape[n] for n in names):
        names = names[:-1]
      parts.append(names or None)
    return PartitionSpec(*parts)

  def over(self, axis: str, size: int) -> tuple[str, ...]:
    """Returns the mesh axes that shard a logical axis of `size`."""
    (names,) = self.spec((axis,), (size,))
    # PartitionSpec makes of one name in a tuple the name.
    return (names,) if isinstance(names, str) else tuple(names or ())


_current: list[Using] = []


class Buffer(nnx.Variable):
  """Holds state that no gradient reaches: router biases, hash tables."""


def param(
  rngs: nnx.Rngs,
  init: Callable,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  *,
  full_precision: bool = False,
) -> nnx.Param:
  """Makes a float32 parameter whose axes are named.

  Args:
    rngs: has a stream 'params'.
    init: (key, shape, dtype) -> jax.Array.
    shape: of the parameter.
    axes: logical name of each axis; None is unsharded.
    full_precision: keeps it in float32 when the model computes in bfloat16
      (norm weights, the router).

  Raises:
    ValueError: `shape` and `axes` differ in length.
  """
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} and axes {axes} differ in length')
  value = init(rngs.params(), shape, jnp.float32)
  return nnx.Param(value, axes=axes, full_precision=full_precision)


def spec(
  axes: Sequence[str | None], rules: Rules, ndim: int | None = None
) -> PartitionSpec:
  """Returns the PartitionSpec of `axes`; unnamed leading ones are unsharded."""
  stack = (ndim or len(axes)) - len(axes)
  return PartitionSpec(*(None,) * stack, *(rules.get(a) for a in axes))


@contextlib.contextmanager
def under(using: Using) -> Iterator[None]:
  """Does what `use` does, with its arguments given together."""
  _current.append(using)
  try:
    # The step is for the mesh's devices, whatever the default one is.
    with target.placed_on(using.mesh.devices.flat[0]):
      yield
  finally:
    _current.pop()


def use(
  mesh: Mesh, rules: Rules, exchange: ExchangeConfig | None = None
) -> contextlib.AbstractContextManager:
  """Applies `rules` to every `shard` traced inside.

  The rules are no part of jit's cache key: trace each step inside one `use`.

  Args:
    mesh: over which the step runs.
    rules: logical axis -> mesh axes.
    exchange: how tokens reach experts of other devices.
  """
  return under(Using(mesh, rules, exchange or ExchangeConfig()))


def current() -> Using | None:
  """Returns what `use` made known; None outside of it."""
  return _current[-1] if _current else None


def in_mesh() -> bool:
  """Returns whether tracing happens inside `use`."""
  return bool(_current)


def _outside() -> bool:
  """Returns whether nothing is to be sharded: no mesh, or in a shard_map."""
  return not _current or bool(jax.sharding.get_abstract_mesh().manual_axes)


def to_shard() -> bool:
  """Returns whether arrays are those of a whole mesh of several devices."""
  return not _outside() and _current[-1].mesh.size > 1


def ways(axis: str, size: int) -> int:
  """Returns the shards of a logical axis of `size`; 1 outside `use`."""
  if _outside():
    return 1
  using = _current[-1]
  over = using.over(axis, size)
  return math.prod(using.mesh.shape[n] for n in over)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains activation `x` to the mesh axes of its logical `axes`."""
  if _outside():
    return x
  using = _current[-1]
  sharding = NamedSharding(using.mesh, using.spec(axes, x.shape))
  return jax.lax.with_sharding_constraint(x, sharding)


def known(x: Any) -> np.ndarray | None:
  """Returns the values of an array on the host, where they are known.

  None inside jit, or where other hosts have some of them.
  """
  traced = isinstance(x, jax.core.Tracer)
  if traced or (isinstance(x, jax.Array) and not x.is_fully_addressable):
    return None
  return np.asarray(x)


def shardings(abstract: Any, mesh: Mesh, rules: Rules) -> Any:
  """Returns NamedShardings of abstract variables (nnx.State leaves)."""

  def one(variable: nnx.Variable) -> NamedSharding:
    axes = variable.get_metadata().get('axes') or ()
    return NamedSharding(mesh, spec(axes, rules, len(variable.shape)))

  leaf = lambda v: isinstance(v, nnx.Variable)
  return jax.tree.map(one, abstract, is_leaf=leaf)
