"""Causal attention 192/128 on Hopper, forward and backward.

causal_output.py has the kernel of the output and of each query's log-sum-exp,
backward.py the two kernels of the gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_prefill import backward, causal_output
from pallas_kernels.mla_prefill.causal_blocks import TILE, VALUE, WIDE


def mla_prefill(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> jax.Array:
  """Returns the attention [B T H 128], bfloat16; pads T to 128 * n."""
  if any(a.dtype != jnp.bfloat16 for a in (q, k, v)):
    raise NotImplementedError(f'dtype {q.dtype}/{v.dtype}, not bfloat16')
  if (q.shape[-1], v.shape[-1]) != (WIDE, VALUE):
    raise NotImplementedError(
      f'dims {q.shape[-1]} and {v.shape[-1]}, not 192 and 128'
    )
  # Scores are masked and their maxima taken before they are scaled.
  if not scale > 0:
    raise NotImplementedError(f'scale {scale}, not above 0')
  T = q.shape[1]
  pad = -T % TILE
  if pad:
    # One more segment, behind all others.
    wide = lambda a: jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q, k, v = wide(q), wide(k), wide(v)
    starts = jnp.pad(starts, ((0, 0), (0, pad)), constant_values=T)
  return _attend(q, k, v, starts, scale)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> jax.Array:
  """Returns the output alone; its gradient is the kernels of backward.py."""
  return causal_output.attend(q, k, v, starts, scale)[0]


def _fwd(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> tuple:
  """Returns the output and what the backward pass keeps."""
  out, lse = causal_output.attend(q, k, v, starts, scale)
  return out, (q, k, v, starts, out, lse)


def _bwd(scale: float, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of q, k and v."""
  q, k, v, starts, out, lse = saved
  grad = grad.astype(jnp.bfloat16)
  # delta = <grad, out>: what the softmax's gradient subtracts in every row.
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  delta = product.sum(-1).swapaxes(1, 2)  # [B H T]
  args = (q, k, v, grad, lse, delta)
  dq = backward.queries(*args, starts, scale)
  dk, dv = backward.keys(*args, _segment_ends(starts), scale)
  return dq, dk, dv, None


_attend.defvjp(_fwd, _bwd)


def _segment_ends(starts: jax.Array) -> jax.Array:
  """Returns the index of the last token of each token's segment, [B T]."""
  at = jnp.arange(starts.shape[1], dtype=jnp.int32)
  last = jnp.pad(
    starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True
  )
  # The nearest last token at or behind each position.
  ends = jnp.where(last, at, starts.shape[1])
  return lax.cummin(ends, axis=1, reverse=True)
