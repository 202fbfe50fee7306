"""Matrices with rows and columns that sum to one, by alternating division.

Manifold-constrained hyper-connections (mHC, arXiv:2512.24880) mix n residual
streams of a token by such a matrix; DeepSeek-V4 takes n = 4 and 20 iterations.
Legend: N tokens, n streams.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sinkhorn import reference

__all__ = ['sinkhorn']


def sinkhorn(
  logits: jax.Array,
  *,
  iterations: int = 20,
  eps: float = 1e-6,
  impl: str | None = None,
) -> jax.Array:
  """Returns softmax over rows + eps, columns and rows divided by their sums.

  The division by column sums comes first and last, so columns sum to one to
  rounding and rows approximately. Every sum gets eps added.

  Args:
    logits: [N n n] float32.
    iterations: divisions by the column sums; between two of them there is one
      by the row sums.
    eps: see above.
    impl: None, 'reference' or 'gpu' (n up to 4).

  Returns:
    [N n n] float32, differentiable in logits.

  Raises:
    ValueError: logits are no square matrices, or iterations < 1.
    NotImplementedError: impl='gpu' for n > 4.
  """
  if logits.ndim != 3 or logits.shape[1] != logits.shape[2]:
    raise ValueError(f'logits are {list(logits.shape)}, not [N n n]')
  if iterations < 1:
    raise ValueError(f'iterations={iterations}; use 1 or more')
  impl = dispatch.chosen(impl)
  return _sinkhorn(logits.astype(jnp.float32), iterations, eps, impl)


def _run(name: str, impl: str | None, *args: Any) -> jax.Array:
  """Runs the kernel or the reference function of that name."""

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.sinkhorn import gpu

    return getattr(gpu, name)(*args)

  functions = {'reference': getattr(reference, name), 'gpu': gpu}
  return dispatch.run(name, impl, functions, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _sinkhorn(
  logits: jax.Array, iterations: int, eps: float, impl: str | None
) -> jax.Array:
  """Returns the matrices; their gradient is `sinkhorn_bwd`."""
  return _run('sinkhorn', impl, logits, iterations, eps)


def _fwd(
  logits: jax.Array, iterations: int, eps: float, impl: str | None
) -> tuple:
  """Returns the matrices, and the logits for the backward pass."""
  return _sinkhorn(logits, iterations, eps, impl), logits


def _bwd(
  iterations: int,
  eps: float,
  impl: str | None,
  logits: jax.Array,
  grad: jax.Array,
) -> tuple:
  """Returns the gradient of the logits."""
  return (_run('sinkhorn_bwd', impl, logits, grad, iterations, eps),)


_sinkhorn.defvjp(_fwd, _bwd)
