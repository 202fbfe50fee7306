"""Context parallelism: sequences split over devices.

Each device keeps the queries of its own tokens. What they read of other tokens
is gathered where it is small (latents, entries, index keys) or comes from the
devices before where it lies near (a window, a block that straddles a border).
Left to XLA's partitioner, a loop over blocks of queries runs on every device
for the queries of all, and the operand of a top-k is gathered.
Legend: B batch, T tokens of a device, S of all, N places.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import collectives as sums
from deepseek_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Along:
  """Describes the shard of the sequence (and heads) that this device holds.

  The default is unsharded.

  Attributes:
    axis: the mesh axis that shards sequences, or None.
    ways: into how many shards.
    heads: the mesh axes that shard heads.
  """

  axis: str | None = None
  ways: int = 1
  heads: tuple[str, ...] = ()

  @property
  def index(self) -> jax.Array | int:
    """Returns the number of this shard, from 0."""
    return jax.lax.axis_index(self.axis) if self.axis else 0

  def gather(self, tree: Any) -> Any:
    """Gathers arrays [B T ...] to [B S ...] of all tokens; gradients scatter.

    What devices add to a gradient is summed in float32; first derivatives.
    """
    if not self.axis:
      return tree
    return jax.tree.map(lambda a: sums.gathered(a, self.axis), tree)

  def own(self, tree: Any) -> Any:
    """Slices arrays [B S ...] to [B T ...] of this device's tokens."""
    if not self.axis:
      return tree

    def one(a: jax.Array) -> jax.Array:
      size = a.shape[1] // self.ways
      return jax.lax.dynamic_slice_in_dim(a, self.index * size, size, axis=1)

    return jax.tree.map(one, tree)

  def before(self, x: jax.Array, count: int, fill: float = 0) -> jax.Array:
    """Returns the `count` tokens that precede the local ones.

    They may be more than the neighbour has; then those before it send, too.

    Args:
      x: [B T ...] of this device's tokens.
      count: tokens to return.
      fill: stands for tokens before the sequence's first.

    Returns:
      [B count ...], in order.
    """
    T, parts, left = x.shape[1], [], count
    for hop in range(1, self.ways):
      size = min(left, T)
      if not size:
        break
      # The first `hop` devices receive nothing, which ppermute gives as zeros.
      pairs = [(i, i + hop) for i in range(self.ways - hop)]
      part = jax.lax.ppermute(x[:, T - size :], self.axis, pairs)
      if fill:
        part = jnp.where(self.index >= hop, part, jnp.asarray(fill, x.dtype))
      parts.insert(0, part)
      left -= size
    ahead = jnp.full((x.shape[0], left, *x.shape[2:]), fill, x.dtype)
    return jnp.concatenate([ahead, *parts], axis=1)

  def mean_of_heads(self, x: jax.Array) -> jax.Array:
    """Returns the mean over devices with other heads."""
    return jax.lax.pmean(x, self.heads) if self.heads else x

  def max_of_heads(self, x: jax.Array) -> jax.Array:
    """Returns the maximum over devices with other heads; no gradient."""
    return jax.lax.pmax(x, self.heads) if self.heads else x

  def sum_of_heads(self, x: jax.Array) -> jax.Array:
    """Returns the sum over devices with other heads; all go on alike."""
    return sums.total(x, self.heads) if self.heads else x

  def sum_of_parts(self, tree: Any) -> Any:
    """Returns sums over devices with other tokens."""
    return jax.lax.psum(tree, self.axis) if self.axis else tree


WHOLE = Along()


def mesh_axis(length: int) -> str | None:
  """Returns the mesh axis that shards a sequence; None if none does."""
  using = sharding.current()
  name = using and using.rules.get('seq')
  if isinstance(name, tuple):
    name = name[0] if len(name) == 1 else None
  if not name or using.mesh.shape[name] == 1 or length % using.mesh.shape[name]:
    return None
  return name


def in_a_row(x: jax.Array, there: jax.Array, count: int) -> jax.Array:
  """Selects the first `count` of x [B N ...] that are `there`, in order."""
  order = jnp.argsort(~there, axis=1, stable=True)[:, :count]
  return jnp.take_along_axis(
    x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1
  )


def split(f: Callable, args: tuple, axes: tuple, out: Any, **sizes: int) -> Any:
  """Calls f(along, *args) on each device for its shard of the sequences.

  To be traced inside `sharding.use`; where nothing shards sequences, f has all.

  Args:
    f: takes an Along and the shards of args.
    args: trees of arrays.
    axes: for each of args the logical names of its arrays' first axes, which
      must be among `sizes`; () is on all devices.
    out: the same for the tree that f returns.
    sizes: of the named axes, 'seq' among them.

  Returns:
    What f returns, whole.
  """
  axis = mesh_axis(sizes['seq'])
  if axis is None:
    return f(WHOLE, *args)
  using = sharding.current()
  cut = {name: using.over(name, size) for name, size in sizes.items()}
  spec = lambda names: PartitionSpec(*(cut.get(name) or None for name in names))
  named = lambda a: (
    isinstance(a, tuple) and all(n is None or isinstance(n, str) for n in a)
  )
  over = lambda tree: jax.tree.map(spec, tree, is_leaf=named)
  # Mesh axes of one device need no collective.
  heads = tuple(n for n in cut.get('heads', ()) if using.mesh.shape[n] > 1)
  along = Along(axis, using.mesh.shape[axis], heads)
  return jax.shard_map(
    lambda *parts: f(along, *parts),
    mesh=using.mesh,
    in_specs=tuple(map(spec, axes)),
    out_specs=over(out),
    check_vma=False,
  )(*args)
