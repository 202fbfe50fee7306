"""Rows in blocks, each block times the matrix of its expert.

The layout comes from `pallas_kernels.permute.plan`. Legend: M rows, E experts,
D width in, F width out.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference

__all__ = ['grouped_matmul']


def _run(name, impl, *args):
  """Kernel or reference function of that name."""

  def gpu(*args):
    from pallas_kernels.grouped_matmul import gpu

    return getattr(gpu, name)(*args)

  op = f'grouped_matmul.{name}'
  return dispatch.run(op, impl, gpu, getattr(reference, name), *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _matmul(rows, weights, block_expert, used, transpose, impl):
  args = (rows, weights, block_expert, used, transpose)
  return _run('forward', impl, *args)


def _fwd(rows, weights, block_expert, used, transpose, impl):
  out = _matmul(rows, weights, block_expert, used, transpose, impl)
  return out, (rows, weights, block_expert, used)


def _bwd(transpose, impl, saved, grad):
  rows, weights, expert, used = saved
  drows = _run('forward', impl, grad, weights, expert, used, not transpose)
  pair = (grad, rows) if transpose else (rows, grad)
  dweights = _run('outer', impl, *pair, expert, used, weights.shape[0])
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
      Blocks of one expert adjoin, as in a plan (the kernel's gradient of the
      weights relies on it).
    used: [] int32, how many leading blocks hold rows (`plan.used`); the rows
      after them must be zero and may be skipped. None: all of them.
    transpose: multiply by the transposed matrices.
    impl: None, 'reference' or 'gpu' (bfloat16, blocks of 64 * n rows, D and F
      multiples of 128).

  Returns:
    [M F] of rows.dtype, accumulated in float32. Differentiable in rows and
    weights.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
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
  return _matmul(rows, weights, block_expert, used, transpose, impl)
