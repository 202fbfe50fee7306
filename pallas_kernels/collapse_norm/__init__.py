"""The weighted sum of a token's residual streams, normed in one.

Manifold-constrained hyper-connections (mHC, arXiv:2512.24880; DeepSeek-V4,
section 2) read n streams by a weight each, and the sublayer's RMSNorm follows.
Both in one: the streams are read once, and their sum is never stored.
Legend: N tokens, n streams, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.collapse_norm import reference

__all__ = ['collapse_norm']


def collapse_norm(
  streams: jax.Array,
  pre: jax.Array,
  gain: jax.Array,
  *,
  eps: float = 1e-6,
  impl: str | None = None,
) -> jax.Array:
  """Returns RMSNorm(sum over n of pre * streams) * gain.

  Args:
    streams: [N n D] bfloat16 or float32.
    pre: [N n] float32, the weight of each stream.
    gain: [D] float32 of the norm.
    eps: of the norm.
    impl: None, 'reference' or 'gpu' (D a multiple of 1024, at most 8192).

  Returns:
    [N D] of streams.dtype, rounded once; differentiable in all three.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a width that the kernel can't take.
  """
  if streams.ndim != 3 or streams.shape[:2] != pre.shape:
    raise ValueError(
      f'pre is {list(pre.shape)}, but streams {list(streams.shape)} ask for'
      f' [N n] of [N n D]'
    )
  if gain.shape != streams.shape[2:]:
    raise ValueError(
      f'gain is {list(gain.shape)}, but streams are {streams.shape[2]} wide'
    )
  wide = lambda a: a.astype(jnp.float32)
  impl = dispatch.chosen(impl)
  return _collapse_norm(streams, wide(pre), wide(gain), eps, impl)


def _run(name: str, impl: str | None, *args: Any) -> Any:
  """Runs the kernel or the reference function of that name."""

  def gpu(*args: Any) -> Any:
    from pallas_kernels.collapse_norm import gpu

    return getattr(gpu, name)(*args)

  functions = {'reference': getattr(reference, name), 'gpu': gpu}
  return dispatch.run(name, impl, functions, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _collapse_norm(
  streams: jax.Array,
  pre: jax.Array,
  gain: jax.Array,
  eps: float,
  impl: str | None,
) -> jax.Array:
  """Returns the normed sum; its gradient recomputes the sum."""
  return _run('collapse_norm', impl, streams, pre, gain, eps)


def _fwd(
  streams: jax.Array,
  pre: jax.Array,
  gain: jax.Array,
  eps: float,
  impl: str | None,
) -> tuple:
  """Returns the normed sum, and the arguments for the backward pass."""
  out = _collapse_norm(streams, pre, gain, eps, impl)
  return out, (streams, pre, gain)


def _bwd(eps: float, impl: str | None, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of streams, weights and gain."""
  return _run('collapse_norm_bwd', impl, *saved, grad, eps)


_collapse_norm.defvjp(_fwd, _bwd)
