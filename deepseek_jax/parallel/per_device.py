"""Per-device top-k and token sums, as explicit shard_maps.

XLA's partitioner doesn't know that some operations work row by row: it gathers
the operand of a top-k from all devices, sorts it everywhere, and shards the
result; and no sharding says that B x T tokens, sharded both ways, became one
list. Inside shard_map there is nothing to gather.
Legend: B sequences, T tokens, N tokens of a device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import sharding


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns jax.lax.top_k of x [B T ...] over the last axis; no gradient.

  Outside of a mesh, and for arrays of fewer axes, it is that very function.

  Returns:
    The values [B T ... k] in the dtype of x, and their indices, int32.
  """
  using = sharding.current()
  if using is None or x.ndim < 3:
    return jax.lax.top_k(x, k)
  spec = using.spec(('batch', 'seq', *(None,) * (x.ndim - 2)), x.shape)
  here = jax.shard_map(
    lambda x: tuple(jax.lax.top_k(x, k)),
    mesh=using.mesh,
    in_specs=spec,
    out_specs=(spec, spec),
    check_vma=False,
  )
  return here(jax.lax.stop_gradient(x))


def token_sum(f: Callable, tokens: tuple, weight: Any) -> jax.Array:
  """Returns the sum over all tokens of what `f` gives for those of a device.

  Args:
    f: (*arrays [N ...], weight) -> scalar, a sum over N.
    tokens: arrays [B T ...].
    weight: [D V], or a tree of arrays [... V]; every device takes all of it,
      unless the mesh shards the vocabulary. Then the partitioner decides.

  Returns:
    A scalar.
  """
  using = sharding.current()
  flat = lambda arrays: [a.reshape(-1, *a.shape[2:]) for a in arrays]
  vocab = jax.tree.leaves(weight)[0].shape[-1]
  if using is None or sharding.ways('vocab', vocab) > 1:
    return f(*flat(tokens), weight)
  specs = [
    using.spec(('batch', 'seq', *(None,) * (a.ndim - 2)), a.shape)
    for a in tokens
  ]
  names = lambda part: (part,) if isinstance(part, str) else part or ()
  over = tuple(name for part in specs[0] for name in names(part))

  def here(tokens: tuple[jax.Array, ...], weight: Any) -> jax.Array:
    return jax.lax.psum(f(*flat(tokens), weight), over)

  return jax.shard_map(
    here,
    mesh=using.mesh,
    in_specs=(tuple(specs), PartitionSpec()),
    out_specs=PartitionSpec(),
    check_vma=False,
  )(tokens, weight)
