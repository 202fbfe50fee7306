"""Divides a stored array into chunks, each written by one process."""

import dataclasses
import math
from collections.abc import Mapping

from deepseek_jax.errors import InputError
from deepseek_jax.hf import loading
from deepseek_jax.hf.names import Leaf
from deepseek_jax.parallel.sharding import Rules

CHUNK = 1 << 26  # bytes of a chunk, at most


@dataclasses.dataclass(frozen=True)
class Share:
  """Describes the part of the work that a process of several does.

  Attributes:
    mesh: sizes of the mesh axes by name, in the mesh's order.
    rules: which mesh axis a logical axis takes.
    process: this process's number ...
    processes: ... of how many; each holds as many neighbouring devices.
  """

  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  rules: Rules = dataclasses.field(default_factory=dict)
  process: int = 0
  processes: int = 1


ALONE = Share()


def shard_counts(leaf: Leaf, share: Share) -> list[int]:
  """Returns into how many shards each axis of a leaf is split.

  Raises:
    InputError: an axis does not divide evenly.
  """
  out = []
  for size, axis in zip(leaf.shape, leaf.axes):
    count = math.prod(share.mesh[a] for a in _mesh_axes(axis, share))
    if size % count:
      raise InputError(
        f'{leaf.name}: axis {axis!r} of {size} is not divisible by the {count}'
        ' shards of the mesh'
      )
    out.append(count)
  return out


def _mesh_axes(axis: str | None, share: Share) -> list[str]:
  """Returns the mesh axes that a logical axis is sharded over."""
  over = share.rules.get(axis) if axis else None
  over = (over,) if isinstance(over, str) else over or ()
  return [a for a in over if a in share.mesh]


def owner(leaf: Leaf, shard: tuple[int, ...], share: Share) -> int:
  """Returns the first process that holds a shard, given its index per axis."""
  # An index on one axis has a digit per mesh axis, the last one fastest.
  at = dict.fromkeys(share.mesh, 0)
  for axis, index in zip(leaf.axes, shard):
    for name in reversed(_mesh_axes(axis, share)):
      index, at[name] = divmod(index, share.mesh[name])
  device = 0
  for name, size in share.mesh.items():
    device = device * size + at[name]
  return device * share.processes // math.prod(share.mesh.values())


def chunk_shape(leaf: Leaf, share: Share, itemsize: int) -> list[int]:
  """Returns the shape of chunks that divide shards and waste no read."""
  limit = CHUNK * 4 // itemsize  # `steps` counts four bytes a number
  shards = shard_counts(leaf, share)
  held = [n // c for n, c in zip(leaf.shape, shards)]
  sizes = [min(s, h) for s, h in zip(loading.steps(leaf, limit), held)]
  if math.prod(shards) > 1:
    for i, size in enumerate(sizes):
      while held[i] % size:
        size -= 1
      sizes[i] = size
  return sizes
