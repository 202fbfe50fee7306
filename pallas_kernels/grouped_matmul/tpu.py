"""Grouped matmul on TPUs: XLA's ragged product, and megablox for gradients.

Compiled ahead of time (libtpu 0.0.42 and 0.0.50), XLA makes one kernel of a
ragged product, of the work of a dense one. Of matrices that it has to transpose
it stores a copy first, and a sum over ragged rows is, before libtpu 0.0.50, a
dense masked product over all experts, of E times the work. jax's megablox needs
neither. Legend: M rows, E experts, D width in, F width out.
"""

import importlib

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tpu_calls
from pallas_kernels.grouped_matmul import accelerators

# Its package has a function by the name of the module.
megablox = importlib.import_module(
  'jax.experimental.pallas.ops.tpu.megablox.gmm'
)
_OPERANDS = 12 * 2**20  # bytes of vector memory that they may take, twice each
_WIDEST = 1024  # columns of a block


def forward(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
) -> jax.Array:
  """Returns the product [M F] of rows [M D] and weights [E F D].

  Raises:
    NotImplementedError: dtypes or blocks that megablox can't take, or weights
      that are not to be transposed.
  """
  if not transpose:
    raise NotImplementedError(
      "the product is XLA's where nothing is transposed"
    )
  block = _check((rows, weights), block_expert)
  E, F, D = weights.shape

  def product(
    rows: jax.Array, weights: jax.Array, expert: jax.Array, used: jax.Array
  ) -> jax.Array:
    rows, weights = tpu_calls.guarded(rows, weights)
    out = megablox.gmm(
      rows,
      weights,
      _sizes(expert, used, E, block),
      rows.dtype,
      forward_tiles(block, D, F, rows.dtype.itemsize),
      transpose_rhs=True,
      interpret=tpu_calls.interpret(),
    )
    return accelerators.in_use(out, expert, used)

  def blocks(*args: jax.Array) -> jax.Array:
    return accelerators.by_blocks(*args, transpose=True)

  args = rows, weights, block_expert, used
  return lax.cond(accelerators.in_order(block_expert), product, blocks, *args)


def outer(
  rows: jax.Array,
  grads: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  num_experts: int,
) -> jax.Array:
  """Sums rows.T @ grads over each expert's rows: [E D F], float32.

  Raises:
    NotImplementedError: dtypes or blocks that megablox can't take.
  """
  block = _check((rows, grads), block_expert)

  def product(
    rows: jax.Array, grads: jax.Array, expert: jax.Array, used: jax.Array
  ) -> jax.Array:
    rows, grads = tpu_calls.guarded(rows, grads)
    return megablox.tgmm(
      rows.T,  # which it transposes back
      grads,
      _sizes(expert, used, num_experts, block),
      jnp.float32,
      outer_tiles(block, rows.shape[1], grads.shape[1]),
      interpret=tpu_calls.interpret(),
    )

  def blocks(*args: jax.Array) -> jax.Array:
    return accelerators.outer_by_blocks(*args, num_experts=num_experts)

  args = rows, grads, block_expert, used
  return lax.cond(accelerators.in_order(block_expert), product, blocks, *args)


def _check(operands: tuple[jax.Array, ...], block_expert: jax.Array) -> int:
  """Returns rows per block; raises NotImplementedError for others."""
  dtypes = {str(a.dtype) for a in operands}
  if dtypes not in ({'bfloat16'}, {'float32'}):
    names = ' and '.join(str(a.dtype) for a in operands)
    raise NotImplementedError(f'{names}, not both bfloat16 or both float32')
  block = operands[0].shape[0] // block_expert.shape[0]
  if block % 16:
    raise NotImplementedError(f'blocks of {block} rows, not 16 * n')
  return block


def _sizes(
  block_expert: jax.Array, used: jax.Array, experts: int, block: int
) -> jax.Array:
  """Returns the rows of each expert [E] int32, of the blocks in use alone."""
  live = jnp.arange(block_expert.shape[0]) < used
  expert = jnp.where(live, block_expert, experts)
  return jnp.bincount(expert, length=experts).astype(jnp.int32) * block


def forward_tiles(
  block: int, inner: int, out: int, itemsize: int
) -> tuple[int, int, int]:
  """Returns rows, inner width and columns of a step.

  With all of the inner width an expert's columns stay where they are while its
  blocks of rows pass.
  """
  columns = _OPERANDS // (2 * itemsize * inner) - block
  if columns < 128:
    return block, min(inner, _WIDEST), min(out, _WIDEST)
  fitting = range(128, min(columns, _WIDEST) + 1, 128)
  whole = [n for n in fitting if out % n == 0]
  return block, inner, whole[-1] if whole else min(out, fitting[-1])


def outer_tiles(block: int, left: int, right: int) -> tuple[int, int, int]:
  """Returns rows of a step, and rows and columns of the sum."""
  return block, min(left, _WIDEST // 2), min(right, _WIDEST)
