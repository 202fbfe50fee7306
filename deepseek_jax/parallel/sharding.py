"""Named axes: arrays say what an axis is, rules say which mesh axis it takes.

A parameter carries one logical name per axis ('embed', 'heads', 'experts' ...;
leading axes without a name are layer stacks). `use(mesh, rules)` maps names to
mesh axes while a step is traced; outside of it `shard` is the identity, so
notebooks and tests need no mesh.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.parallel.exchange import ExchangeConfig

Rules = Mapping[str, str | tuple[str, ...] | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Using:
  """What `use` makes known to layers."""

  mesh: Mesh
  rules: Rules
  exchange: ExchangeConfig = ExchangeConfig()

  def spec(self, axes, shape) -> PartitionSpec:
    """The PartitionSpec of an activation of `shape` with logical `axes`.

    Mesh axes that do not divide a size are left out, last ones first: one
    token of a cache has nothing to split.
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
    """The mesh axes that cut a logical axis of `size`."""
    (names,) = self.spec((axis,), (size,))
    # PartitionSpec makes of one name in a tuple the name.
    return (names,) if isinstance(names, str) else tuple(names or ())


_current: list[Using] = []


class Buffer(nnx.Variable):
  """State that no gradient reaches: router biases, hash tables."""


def param(rngs, init, shape, axes, *, full_precision: bool = False):
  """Makes a float32 parameter whose axes are named.

  `full_precision` keeps it in float32 when the model computes in bfloat16
  (norm weights, the router).
  """
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} and axes {axes} differ in length')
  value = init(rngs.params(), shape, jnp.float32)
  return nnx.Param(value, axes=axes, full_precision=full_precision)


def spec(axes, rules: Rules, ndim: int | None = None) -> PartitionSpec:
  """The PartitionSpec of logical `axes`; unnamed leading axes are unsharded."""
  stack = (ndim or len(axes)) - len(axes)
  return PartitionSpec(*(None,) * stack, *(rules.get(a) for a in axes))


@contextlib.contextmanager
def under(using: Using):
  """As `use`, with what is given together."""
  _current.append(using)
  try:
    yield
  finally:
    _current.pop()


def use(mesh: Mesh, rules: Rules, exchange: ExchangeConfig | None = None):
  """Applies `rules` to every `shard` traced inside.

  The rules are no part of jit's cache key: trace each step inside one `use`.

  Args:
    mesh: over which the step runs.
    rules: logical axis -> mesh axes.
    exchange: how tokens reach experts of other devices.
  """
  return under(Using(mesh, rules, exchange or ExchangeConfig()))


def current() -> Using | None:
  """What tracing happens under; None outside `use`."""
  return _current[-1] if _current else None


def in_mesh() -> bool:
  """Whether tracing happens inside `use`."""
  return bool(_current)


def _outside() -> bool:
  """Whether there is nothing to cut: no mesh, or already one device's part."""
  return not _current or bool(jax.sharding.get_abstract_mesh().manual_axes)


def ways(axis: str, size: int) -> int:
  """Into how many parts a logical axis of `size` is cut; 1 outside `use`."""
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


def known(x) -> np.ndarray | None:
  """The values of an array on the host; None inside jit, or of other hosts."""
  traced = isinstance(x, jax.core.Tracer)
  if traced or (isinstance(x, jax.Array) and not x.is_fully_addressable):
    return None
  return np.asarray(x)


def shardings(abstract, mesh: Mesh, rules: Rules):
  """NamedShardings for a tree of abstract variables (nnx.State leaves)."""

  def one(variable):
    axes = variable.get_metadata().get('axes') or ()
    return NamedSharding(mesh, spec(axes, rules, len(variable.shape)))

  leaf = lambda v: isinstance(v, nnx.Variable)
  return jax.tree.map(one, abstract, is_leaf=leaf)
