"""Where the arrays of a run live when it spans several devices.

Parameters are copied to all devices unless told otherwise; a batch is cut along
its rows. Every process reads the rows that its own devices need: the global
batch is the same on any number of processes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.errors import InputError
from deepseek_jax.parallel import distributed


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh and what goes where on it; without a mesh JAX decides.

  Attributes:
    mesh: over the devices of all processes.
    rows: the axes of the mesh along which a batch is cut.
  """

  mesh: Mesh | None = None
  rows: tuple[str, ...] = ('data',)

  @property
  def copied(self) -> NamedSharding | None:
    """Where a copy is on every device."""
    return self._sharding()

  @property
  def cut(self) -> NamedSharding | None:
    """Where every device has some rows."""
    return self._sharding(self.rows)

  def _sharding(self, *axes) -> NamedSharding | None:
    if self.mesh is None:
      return None
    return NamedSharding(self.mesh, PartitionSpec(*axes))

  def abstract(self, make: Callable[[], Any]):
    """Shapes, dtypes and places of what `make` makes."""
    shapes = jax.eval_shape(make)
    if self.mesh is None:
      return shapes
    place = lambda s: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=self.copied
    )
    return jax.tree.map(place, shapes)

  def block(self, size: int) -> tuple[int, int]:
    """The rows of a global batch that this process reads: block i of n.

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
    for n in range(shards, 0, -1):
      length = size // n
      if size % n == 0 and low // length == (high - 1) // length:
        return low // length, n
    return 0, 1

  def batch(self, rows: dict[str, np.ndarray], size: int) -> dict:
    """Global arrays of `size` rows from the block that this process read."""
    if self.mesh is None:
      return rows
    index, _ = self.block(size)

    def whole(array):
      start = index * len(array)

      def part(where):
        low, high, _ = where[0].indices(size)
        return array[low - start : high - start]

      shape = (size, *array.shape[1:])
      return jax.make_array_from_callback(shape, self.cut, part)

    return jax.tree.map(whole, rows)


def over_all_devices() -> Placement:
  """Copies everywhere, batches cut over the devices of all processes."""
  mesh = jax.make_mesh(
    (jax.device_count(),),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  return Placement(mesh)


def choose() -> Placement:
  """For several processes all of their devices, for one what JAX decides."""
  return over_all_devices() if distributed.several() else Placement()


def to_first(tree):
  """The tree in the memory of process 0's host, None in the others.

  Every process must ask. Parts of an array come together leaf by leaf.
  """
  if not distributed.several():
    return tree
  from jax.experimental import multihost_utils

  def one(leaf):
    whole = (
      np.asarray(leaf)
      if leaf.is_fully_replicated
      else multihost_utils.process_allgather(leaf, tiled=True)
    )
    return whole if distributed.first() else None

  return jax.tree.map(one, tree)
