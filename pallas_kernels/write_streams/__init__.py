"""Residual streams mixed, and a sublayer's output added to each, in one.

Manifold-constrained hyper-connections (mHC, arXiv:2512.24880; DeepSeek-V4,
section 2) write back so: streams are read and written once, and so are their
gradients. Legend: N tokens, n streams, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.write_streams import reference

__all__ = ['write_streams']


def write_streams(
  streams: jax.Array,
  y: jax.Array,
  post: jax.Array,
  comb: jax.Array,
  *,
  impl: str | None = None,
) -> jax.Array:
  """Returns for each k the sum over j of comb[j, k] * streams[j], + post[k] y.

  Args:
    streams: [N n D] bfloat16 or float32.
    y: [N D] of the same dtype, the sublayer's output.
    post: [N n] float32.
    comb: [N n n] float32, how much of stream j goes to stream k.
    impl: None, 'reference' or 'gpu' (n up to 4, D a multiple of 512).

  Returns:
    [N n D] of streams.dtype, rounded once; differentiable in all four.

  Raises:
    ValueError: shapes or dtypes that don't fit each other.
    NotImplementedError: impl='gpu' for a size that the kernel can't take.
  """
  if streams.ndim != 3:
    raise ValueError(f'streams are {list(streams.shape)}, not [N n D]')
  N, n, D = streams.shape
  wanted = {'y': (y, (N, D)), 'post': (post, (N, n)), 'comb': (comb, (N, n, n))}
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but streams {list(streams.shape)} ask'
        f' for {list(shape)}'
      )
  if y.dtype != streams.dtype:
    raise ValueError(f'y is {y.dtype}, but streams are {streams.dtype}')
  wide = lambda a: a.astype(jnp.float32)
  impl = dispatch.chosen(impl)
  return _write_streams(streams, y, wide(post), wide(comb), impl)


def _run(name: str, impl: str | None, *args: Any) -> Any:
  """Runs the kernel or the reference function of that name."""

  def gpu(*args: Any) -> Any:
    from pallas_kernels.write_streams import gpu

    return getattr(gpu, name)(*args)

  functions = {'reference': getattr(reference, name), 'gpu': gpu}
  return dispatch.run(name, impl, functions, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _write_streams(
  streams: jax.Array,
  y: jax.Array,
  post: jax.Array,
  comb: jax.Array,
  impl: str | None,
) -> jax.Array:
  """Returns the new streams."""
  return _run('write_streams', impl, streams, y, post, comb)


def _bwd(impl: str | None, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of all four."""
  return _run('write_streams_bwd', impl, *saved, grad)


_write_streams.defvjp(lambda *args: (_write_streams(*args), args[:4]), _bwd)
