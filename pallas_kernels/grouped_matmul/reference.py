"""Grouped matmul in XLA: by runs on a CPU, else by blocks or ragged products.

XLA:CPU packs both operands for every product, so a run of blocks of one expert
is split into chunks of 512, 256, ... rows rather than into blocks, and one
expert's weight gradient is summed before it is stored: within 20 % of one dense
matmul of that size. There loops end when the data says so, for which
accelerators would wait at every turn: see `accelerators`. The platform that a
program is lowered for decides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import accelerators
from pallas_kernels.quantize import reference as quantize

_CHUNK = 512  # rows of the largest product
# Up to here a copy of each row's matrix costs less than a loop (measured).
_GATHER = 16


def _dot(x: jax.Array, y: jax.Array, contract: tuple) -> jax.Array:
  """Returns the product over the given dims, accumulated in float32."""
  return lax.dot_general(
    x, y, (contract, ((), ())), preferred_element_type=jnp.float32
  )


def _run_ends(block_expert: jax.Array) -> jax.Array:
  """Returns the first later block of another expert, for each block."""
  n = block_expert.shape[0]
  changes = block_expert[1:] != block_expert[:-1]
  ends = jnp.append(jnp.where(changes, jnp.arange(1, n), n), n)
  return lax.cummin(ends.astype(jnp.int32), reverse=True)


def _over_runs(
  step: Callable, carry: Any, block_expert: jax.Array, used: jax.Array
) -> Any:
  """Folds step(carry, expert, first block, blocks) over all runs."""
  ends = jnp.minimum(_run_ends(block_expert), used)

  def body(state: tuple) -> Any:
    at, carry = state
    carry = step(carry, block_expert[at], at, ends[at] - at)
    return ends[at], carry

  start = (jnp.int32(0), carry)
  return lax.while_loop(lambda state: state[0] < used, body, start)[1]


def _over_chunks(
  step: Callable,
  carry: Any,
  at: jax.Array,
  blocks: jax.Array,
  rows: int,
  block: int,
) -> Any:
  """Folds step(carry, first row, static rows), largest chunks first."""
  # Half of the rows at most: a product of all of them is the same in every
  # turn, so XLA would move it out of the loop and do it for each run.
  top = max(min(_CHUNK, rows // 2) // block, 1)
  top = 1 << (top.bit_length() - 1)  # then each smaller size comes 0 or 1 times
  carry = lax.fori_loop(
    0,
    blocks // top,
    lambda i, carry: step(carry, (at + i * top) * block, top * block),
    carry,
  )
  for level in [top >> i for i in range(1, top.bit_length())]:

    def once(carry: Any, level: int = level) -> Any:
      before = blocks & -2 * level  # of larger sizes
      return step(carry, (at + before) * block, level * block)

    # A smaller size comes once, or not.
    carry = lax.cond(blocks & level, once, lambda carry: carry, carry)
  return carry


def forward(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
) -> jax.Array:
  """Returns the product [M F] of rows [M D] and weights [E D F] or [E F D]."""
  M = rows.shape[0]
  if M <= _GATHER:
    block = M // max(len(block_expert), 1)
    picked = jnp.repeat(weights[block_expert], block, axis=0)
    form = 'MD,MFD->MF' if transpose else 'MD,MDF->MF'
    out = jnp.einsum(form, rows, picked, preferred_element_type=jnp.float32)
    return out.astype(rows.dtype)
  return lax.platform_dependent(
    rows,
    weights,
    block_expert,
    used,
    cpu=functools.partial(by_runs, transpose=transpose),
    tpu=functools.partial(accelerators.ragged, transpose=transpose),
    default=functools.partial(accelerators.by_blocks, transpose=transpose),
  )


def by_runs(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  *,
  transpose: bool,
) -> jax.Array:
  """Computes `forward` by runs of blocks of one expert."""
  M, F = rows.shape[0], weights.shape[1 if transpose else 2]

  def run(
    out: jax.Array, expert: jax.Array, at: jax.Array, blocks: jax.Array
  ) -> jax.Array:
    w = lax.dynamic_index_in_dim(weights, expert, keepdims=False)

    def chunk(out: jax.Array, row: jax.Array, size: int) -> jax.Array:
      x = lax.dynamic_slice_in_dim(rows, row, size)
      y = _dot(x, w, ((1,), (1 if transpose else 0,))).astype(out.dtype)
      return lax.dynamic_update_slice_in_dim(out, y, row, 0)

    return _over_chunks(chunk, out, at, blocks, M, M // len(block_expert))

  return _over_runs(run, jnp.zeros((M, F), rows.dtype), block_expert, used)


def forward_fp8(
  rows: jax.Array,
  row_scales: jax.Array,
  weights: jax.Array,
  weight_scales: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Returns the product [M F] of dequantised rows and weights."""
  x = quantize.dequantize(rows, row_scales, jnp.float32)
  every = lambda q, s: quantize.dequantize(q, s, jnp.float32)
  w = jax.vmap(every)(weights, weight_scales)
  return forward(x, w, block_expert, used, True).astype(dtype)


def outer(
  rows: jax.Array,
  grads: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  num_experts: int,
) -> jax.Array:
  """Sums rows.T @ grads over each expert's rows: [E D F], float32."""
  if not rows.shape[0]:
    return jnp.zeros((num_experts, rows.shape[1], grads.shape[1]), jnp.float32)
  return lax.platform_dependent(
    rows,
    grads,
    block_expert,
    used,
    cpu=functools.partial(outer_by_runs, num_experts=num_experts),
    default=functools.partial(
      accelerators.outer_by_blocks, num_experts=num_experts
    ),
  )


def outer_by_runs(
  rows: jax.Array,
  grads: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  *,
  num_experts: int,
) -> jax.Array:
  """Computes `outer` by runs of blocks of one expert."""
  M, D, F = *rows.shape, grads.shape[1]

  def run(
    total: jax.Array, expert: jax.Array, at: jax.Array, blocks: jax.Array
  ) -> jax.Array:
    def chunk(part: jax.Array, row: jax.Array, size: int) -> jax.Array:
      x, g = (lax.dynamic_slice_in_dim(a, row, size) for a in (rows, grads))
      return part + _dot(x, g, ((0,), (0,)))

    part = jnp.zeros((D, F), jnp.float32)
    part = _over_chunks(chunk, part, at, blocks, M, M // len(block_expert))
    return total.at[expert].add(part)

  zero = jnp.zeros((num_experts, D, F), jnp.float32)
  return _over_runs(run, zero, block_expert, used)


def outer_fp8(
  rows: jax.Array,
  row_scales: jax.Array,
  grads: jax.Array,
  grad_scales: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  num_experts: int,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Sums dequantised rows @ grads.T over each expert's rows: [E D F]."""
  x = quantize.dequantize(rows, row_scales, jnp.float32)
  g = quantize.dequantize(grads, grad_scales, jnp.float32)
  return outer(x.T, g.T, block_expert, used, num_experts).astype(dtype)
