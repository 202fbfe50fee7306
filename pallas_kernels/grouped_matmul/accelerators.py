"""Grouped matmul in XLA for accelerators: no loop waits for the data.

A loop of a known number of turns is enqueued as a whole. A GPU that has no
kernel of ours multiplies block by block: jax's ragged product is there one
dense masked product over all experts, of E times the work. On a TPU the ragged
product is native, where the blocks lie in the order of the experts, as a plan
lays them. Legend: M rows, E experts, D width in, F width out, N blocks.
"""

import jax
import jax.numpy as jnp
from jax import lax

_F32 = {'preferred_element_type': jnp.float32}


def _blocks(x: jax.Array, block_expert: jax.Array) -> jax.Array:
  """Returns x [M D] as [N M/N D]."""
  return x.reshape(block_expert.shape[0], -1, x.shape[1])


def in_use(
  out: jax.Array, block_expert: jax.Array, used: jax.Array
) -> jax.Array:
  """Returns out [M F] with zeros in what is not used, whatever weights are."""
  block = out.shape[0] // block_expert.shape[0]
  return jnp.where((jnp.arange(out.shape[0]) < used * block)[:, None], out, 0)


def in_order(block_expert: jax.Array) -> jax.Array:
  """Returns whether the blocks lie in the order of the experts, as planned."""
  return (block_expert[1:] >= block_expert[:-1]).all()


def by_blocks(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  *,
  transpose: bool,
) -> jax.Array:
  """Returns the product [M F], a block at a time."""
  form = 'BD,FD->BF' if transpose else 'BD,DF->BF'

  def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, expert = block
    w = lax.dynamic_index_in_dim(weights, expert, keepdims=False)
    return jnp.einsum(form, x, w, **_F32).astype(rows.dtype)

  out = lax.map(one, (_blocks(rows, block_expert), block_expert))
  return in_use(out.reshape(rows.shape[0], -1), block_expert, used)


def ragged(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  *,
  transpose: bool,
) -> jax.Array:
  """Returns the product [M F] by lax.ragged_dot, where the blocks are sorted.

  Others, which no plan gives, go block by block.
  """
  E, block = weights.shape[0], rows.shape[0] // block_expert.shape[0]

  def product(
    rows: jax.Array, weights: jax.Array, expert: jax.Array, used: jax.Array
  ) -> jax.Array:
    sizes = jnp.bincount(expert, length=E) * block
    right = weights.swapaxes(1, 2) if transpose else weights
    out = lax.ragged_dot(rows, right, sizes.astype(jnp.int32), **_F32)
    return in_use(out.astype(rows.dtype), expert, used)

  def blocks(*args: jax.Array) -> jax.Array:
    return by_blocks(*args, transpose=transpose)

  args = (rows, weights, block_expert, used)
  return lax.cond(in_order(block_expert), product, blocks, *args)


def outer_by_blocks(
  rows: jax.Array,
  grads: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  *,
  num_experts: int,
) -> jax.Array:
  """Sums rows.T @ grads of each expert's blocks: [E D F], float32."""
  index = jnp.arange(block_expert.shape[0])
  start = jnp.zeros((num_experts, rows.shape[1], grads.shape[1]), jnp.float32)

  def one(total: jax.Array, block: tuple) -> tuple[jax.Array, None]:
    x, g, expert, at = block
    part = jnp.einsum('BD,BF->DF', x, g, **_F32)
    return total.at[expert].add(jnp.where(at < used, part, 0.0)), None

  parts = (_blocks(rows, block_expert), _blocks(grads, block_expert))
  return lax.scan(one, start, (*parts, block_expert, index))[0]
