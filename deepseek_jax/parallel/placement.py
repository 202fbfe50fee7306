"""Places the arrays of a run that spans several devices.

Rules lay a state's parameters and moments on the mesh; without a mesh JAX
decides. A batch is sharded along its rows. Every process reads the rows that
its own devices need: the global batch is the same on any number of processes.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.errors import InputError
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.parallel import processor, sharding
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig, Rules

_DEFAULT = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Placement:
  """Holds a mesh and what goes where on it; without a mesh JAX decides.

  Attributes:
    mesh: over the devices of all processes.
    rows: the axes of the mesh along which a batch is sharded.
    rules: logical axis -> mesh axes.
    exchange: how tokens reach experts of other devices.
  """

  mesh: Mesh | None = None
  rows: tuple[str, ...] = ('data',)
  rules: Rules = dataclasses.field(default_factory=dict)
  exchange: ExchangeConfig = ExchangeConfig()

  @functools.cached_property
  def using(self) -> sharding.Using:
    """Returns what layers are given; always the same, to keep programs."""
    return sharding.Using(self.mesh, self.rules, self.exchange)

  def use(self) -> contextlib.AbstractContextManager:
    """Returns the context in which to trace what works on these arrays."""
    if self.mesh is None:
      return contextlib.nullcontext()
    return sharding.under(self.using)

  @property
  def copied(self) -> NamedSharding | None:
    """Returns the sharding of an array that every device has whole."""
    return self._sharding()

  @property
  def cut(self) -> NamedSharding | None:
    """Returns the sharding of an array of which every device has some rows."""
    return self._sharding(self.rows)

  def _sharding(self, *axes: str | tuple[str, ...]) -> NamedSharding | None:
    """Returns a sharding, a mesh axis per array axis; None without a mesh."""
    if self.mesh is None:
      return None
    return NamedSharding(self.mesh, PartitionSpec(*axes))

  def shardings(self, tree: Any, variables: dict[str, nnx.State]) -> Any:
    """Returns NamedShardings of a model's variables; None without a mesh.

    Args:
      tree: arrays or shapes, e.g. a TrainState.
      variables: `Model.abstract`.
    """
    if self.mesh is None:
      return None
    return meshes.shardings(self.mesh, self.rules, variables, tree)

  def abstract(
    self, make: Callable[[], Any], variables: dict[str, nnx.State]
  ) -> Any:
    """Returns shapes, dtypes and `shardings` of what `make` makes."""
    shapes = jax.eval_shape(make)
    if self.mesh is None:
      return shapes
    place = lambda s, where: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=where
    )
    return jax.tree.map(place, shapes, self.shardings(shapes, variables))

  def make(
    self, make: Callable[[], Any], variables: dict[str, nnx.State]
  ) -> Any:
    """Returns what `make` makes, each shard by the device that stores it."""
    where = self.shardings(jax.eval_shape(make), variables)
    with self.use():
      how = processor.options('init')
      return jax.jit(make, out_shardings=where, compiler_options=how)()

  def put(self, tree: Any, variables: dict[str, nnx.State]) -> Any:
    """Returns a model's variables where the rules lay them.

    Every process must have all of them, and ask.

    Args:
      tree: arrays.
      variables: `Model.abstract`.
    """
    where = self.shardings(tree, variables)
    if where is None:
      return jax.tree.map(jax.numpy.asarray, tree)
    if distributed.several():
      # What lies on a device of one process can't be sent to the others.
      here = lambda a: not isinstance(a, jax.Array) or a.is_fully_addressable
      tree = jax.tree.map(lambda a: np.asarray(a) if here(a) else a, tree)
    return jax.device_put(tree, where)

  def block(self, size: int) -> tuple[int, int]:
    """Returns the rows of a global batch that this process reads: block i of n.

    Args:
      size: rows of the global batch.

    Returns:
      (i, n): the smallest of n equal blocks that holds all rows of this
      process's devices.

    Raises:
      InputError: the devices cannot share the rows.
    """
    if self.mesh is None:
      return 0, 1
    shards = math.prod(self.mesh.shape[axis] for axis in self.rows)
    if size % shards:
      raise InputError(
        f'train.batch: {size} sequences cannot be shared by {shards} devices;'
        f' set every size to a multiple of {shards}'
      )
    mine = self.cut.addressable_devices_indices_map((size,)).values()
    spans = [rows.indices(size)[:2] for (rows,) in mine]
    low, high = min(a for a, _ in spans), max(b for _, b in spans)
    # The most blocks, that is the smallest, of which one has all of low..high.
    for n in range(shards, 0, -1):
      length = size // n
      if size % n == 0 and low // length == (high - 1) // length:
        return low // length, n
    return 0, 1

  def batch(self, rows: dict[str, np.ndarray], size: int) -> dict:
    """Returns global arrays of `size` rows, from the block of this process.

    Args:
      rows: arrays [rows of the block ...], on the host.
      size: rows of the global batch.
    """
    if self.mesh is None:
      return rows
    index, _ = self.block(size)

    def whole(array: np.ndarray) -> jax.Array:
      start = index * len(array)

      def part(where: tuple[slice, ...]) -> np.ndarray:
        low, high, _ = where[0].indices(size)
        return array[low - start : high - start]

      shape = (size, *array.shape[1:])
      return jax.make_array_from_callback(shape, self.cut, part)

    return jax.tree.map(whole, rows)


def over(
  config: MeshConfig,
  variables: dict[str, nnx.State] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Placement:
  """Checks `config` and returns the placement that it describes.

  Args:
    config: sizes, rules, exchange.
    variables: `Model.abstract`, to be checked against the rules.
    devices: as for `mesh.make`.

  Raises:
    InputError: names the parameter, its axis and the sizes that do not fit.
  """
  if variables is not None:
    meshes.check(config, variables)
  rows = meshes.names(config.rules.get('batch'))
  mesh = meshes.make(config, devices)
  return Placement(mesh, rows, config.rules, config.exchange)


def over_all_devices(
  config: MeshConfig = _DEFAULT, variables: dict[str, nnx.State] | None = None
) -> Placement:
  """Returns copies everywhere, batches sharded over all processes' devices."""
  config = dataclasses.replace(config, data=jax.device_count())
  return over(config, variables)


def choose(
  config: MeshConfig = _DEFAULT, variables: dict[str, nnx.State] | None = None
) -> Placement:
  """Returns what is configured; by default a device, or all of many processes.

  Raises:
    InputError: the mesh fits neither the devices nor the model.
  """
  if config.devices > 1:
    return over(config, variables)
  if distributed.several():
    return over_all_devices(config, variables)
  return Placement()


def to_first(tree: Any) -> Any:
  """Returns the tree in the memory of process 0's host, None in the others.

  Every process must ask. Shards of an array come together leaf by leaf. What a
  process by itself has on one device stays there.
  """
  if not distributed.several():
    # A copy on the host is needed only of what lies on several devices.
    spread = lambda a: len(a.sharding.device_set) > 1
    here = lambda a: isinstance(a, np.ndarray | np.generic)
    one = lambda a: np.asarray(a) if here(a) or spread(a) else a
    return jax.tree.map(one, tree)
  from jax.experimental import multihost_utils

  def one(leaf: jax.Array):
    whole = (
      np.asarray(leaf)
      if leaf.is_fully_replicated
      else multihost_utils.process_allgather(leaf, tiled=True)
    )
    return whole if distributed.first() else None

  return jax.tree.map(one, tree)
