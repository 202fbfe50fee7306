"""Rows in blocks, each block times the matrix of its expert.

The layout comes from `pallas_kernels.permute.plan`. Legend: M rows, E experts,
D width in, F width out.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference

__all__ = ['grouped_matmul']


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul(rows, weights, block_expert, used, transpose):
  return reference.forward(rows, weights, block_expert, used, transpose)


def _fwd(rows, weights, block_expert, used, transpose):
  out = reference.forward(rows, weights, block_expert, used, transpose)
  return out, (rows, weights, block_expert, used)


def _bwd(transpose, saved, grad):
  rows, weights, block_expert, used = saved
  drows = reference.forward(grad, weights, block_expert, used, not transpose)
  pair = (grad, rows) if transpose else (rows, grad)
  dweights = reference.outer(*pair, block_expert, used, weights.shape[0])
  return drows, dweights.astype(weights.dtype), None, None


_matmul.defvjp(_fwd, _bwd)


def grouped_matmul(
  rows, weights, block_expert, *, used=None, transpose: bool = False, impl=None
):
  """out[m] = rows[m] @ weights[block_expert[m // block]].

  Args:
    rows: [M D] float.
    weights: [E D F], or [E F D] with `transpose`.
    block_expert: [M // block] int32, each in 0..E-1; the block is inferred.
      Adjoining blocks of one expert are multiplied together.
    used: [] int32, how many leading blocks hold rows (`plan.used`); the rows
      after them must be zero and may be skipped. None: all of them.
    transpose: multiply by the transposed matrices.
    impl: None, 'reference' or 'gpu'.

  Returns:
    [M F] of rows.dtype, accumulated in float32. Differentiable in rows and
    weights.

  Raises:
    ValueError: shapes that don't fit each other.
  """
  M, D = rows.shape
  inner = weights.shape[2 if transpose else 1]
  if inner != D:
    raise ValueError(
      f'rows {list(rows.shape)} and weights {list(weights.shape)} '
      f'(transpose={transpose}) disagree on the width: {D} and {inner}'
    )
  if M % block_expert.shape[0]:
    raise ValueError(
      f'{M} rows are no multiple of the {block_expert.shape[0]} blocks'
    )
  used = block_expert.shape[0] if used is None else used
  used = jnp.asarray(used, jnp.int32)
  block_expert = jnp.asarray(block_expert)
  return _matmul(rows, weights, block_expert, used, transpose)
