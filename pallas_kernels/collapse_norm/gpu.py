"""The normed sum of residual streams on Hopper: a token per warpgroup.

A thread holds D / 128 numbers of the sum in registers, so streams are read
once. The backward kernel recomputes the sum; each thread block takes every so
many tokens and adds up its part of the gain's gradient in shared memory.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

STEP = 1024  # a warpgroup loads 16 bytes a thread at a time
MOST = 8192  # wider rows don't fit registers
_PER_CORE = 2  # thread blocks of the backward pass on a multiprocessor


def collapse_norm(
  streams: jax.Array, pre: jax.Array, gain: jax.Array, eps: float
) -> jax.Array:
  """Returns the normed sum [N D].

  Raises:
    NotImplementedError: a width or dtype that the kernel can't take.
  """
  _check(streams)
  N, _, D = streams.shape
  return compat.kernel(
    functools.partial(_forward_body, eps=eps),
    jax.ShapeDtypeStruct((N, D), streams.dtype),
    grid={'token': N},
  )(streams, pre, gain)


def collapse_norm_bwd(
  streams: jax.Array,
  pre: jax.Array,
  gain: jax.Array,
  grad: jax.Array,
  eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of streams, pre and gain.

  Raises:
    NotImplementedError: a width or dtype that the kernel can't take.
  """
  _check(streams)
  N, _, D = streams.shape
  blocks = min(N, _PER_CORE * compat.num_sms())
  dstreams, dpre, parts = compat.kernel(
    functools.partial(_backward_body, eps=eps, blocks=blocks),
    (
      jax.ShapeDtypeStruct(streams.shape, streams.dtype),
      jax.ShapeDtypeStruct(pre.shape, jnp.float32),
      jax.ShapeDtypeStruct((blocks, D), jnp.float32),
    ),
    grid={'block': blocks},
    scratch={'total': plgpu.SMEM((D,), jnp.float32)},
  )(streams, pre, gain, grad)
  return dstreams, dpre, parts.sum(axis=0)


def _check(streams: jax.Array) -> None:
  """Raises NotImplementedError for a width or dtype it can't take."""
  D, dtype = streams.shape[2], streams.dtype
  if D % STEP or D > MOST:
    raise NotImplementedError(f'width {D}, not {STEP} * n up to {MOST}')
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'dtype {dtype}, not bfloat16 or float32')


def _row(ref: jax.Ref, *at: jax.Array | int) -> jax.Array:
  """Loads a row of D numbers, a slice a thread, as float32."""
  # Every row alike, whatever its dtype, so that they meet in registers.
  layout = plgpu.Layout.WG_STRIDED((ref.shape[-1],), vec_size=4)
  where = (*at, slice(None))
  return compat.load(ref, where, layout, optimized=False).astype(jnp.float32)


def _collapsed(streams: jax.Ref, pre: jax.Ref, token: jax.Array) -> jax.Array:
  """Returns the weighted sum [D] of a token's streams."""
  total = pre[token, 0] * _row(streams, token, 0)
  for j in range(1, streams.shape[1]):
    total += pre[token, j] * _row(streams, token, j)
  return total


def _forward_body(
  streams: jax.Ref, pre: jax.Ref, gain: jax.Ref, out: jax.Ref, *, eps: float
) -> None:
  """Computes one token."""
  token = lax.axis_index('token')
  x = _collapsed(streams, pre, token)
  x = x * lax.rsqrt((x * x).sum() / x.shape[0] + eps) * _row(gain)
  out[token, :] = x.astype(out.dtype)


def _backward_body(
  streams: jax.Ref, pre: jax.Ref, gain: jax.Ref, grad: jax.Ref,
  dstreams: jax.Ref, dpre: jax.Ref, parts: jax.Ref, total: jax.Ref, *,
  eps: float, blocks: int,
) -> None:  # fmt: skip
  """Computes every `blocks`-th token."""
  block = lax.axis_index('block')
  N, n, D = streams.shape
  total[...] = jnp.zeros_like(_row(gain))

  def one(i: jax.Array, _) -> tuple:
    token = block + i * blocks
    x = _collapsed(streams, pre, token)
    turn = lax.rsqrt((x * x).sum() / D + eps)
    x = x * turn
    # Gain: its part of this token, added to that of the tokens before.
    y = _row(grad, token)
    total[...] = _row(total) + y * x
    # Norm: what points along x changes nothing.
    y = y * _row(gain)
    dx = turn * (y - x * ((y * x).sum() / D))
    # Streams and their weights.
    for j in range(n):
      dpre[token, j] = (_row(streams, token, j) * dx).sum()
      dstreams[token, j, :] = (pre[token, j] * dx).astype(dstreams.dtype)
    return ()

  count = lax.div(N - 1 - block, blocks) + 1
  lax.fori_loop(0, count, one, ())
  parts[block, :] = _row(total)
