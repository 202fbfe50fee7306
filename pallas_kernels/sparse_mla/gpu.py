"""Attention over gathered latents on Hopper, forward and backward.

This module prepares the inputs of the kernels: heads and choices padded to
multiples of 64, and the latents of all rows in one list.
Legend: N queries of all rows, H heads (padded), K chosen (padded).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.latent_blocks import LATENT, ROPE, check_dims
from pallas_kernels.sparse_mla import forward, latent_gradient, query_gradient
from pallas_kernels.sparse_mla.gathered_blocks import BLOCK, HEADS

MOST = 65_535  # queries of one call: so far a grid goes in all but one axis


def sparse_mla(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  index: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the attention [B T H C], bfloat16."""
  if any(a.dtype != jnp.bfloat16 for a in (q_c, q_r, c, k_r)):
    raise NotImplementedError(f'dtype {q_c.dtype}/{c.dtype}, not bfloat16')
  check_dims(q_c.shape[-1], q_r.shape[-1])
  B, T, H, _ = q_c.shape
  S, K = c.shape[1], index.shape[-1]
  # Padded heads are dropped below; padded choices choose nothing.
  pad_heads, pad_index = -H % HEADS, -K % BLOCK
  flat = lambda q: jnp.pad(
    q.reshape(B * T, H, -1), ((0, 0), (0, pad_heads), (0, 0))
  )
  # The latents of all rows are one list, in which a row begins at S b.
  row = jnp.arange(B, dtype=jnp.int32)[:, None, None] * S
  at = jnp.where(index >= 0, index.astype(jnp.int32) + row, -1)
  at = jnp.pad(
    at.reshape(B * T, K), ((0, 0), (0, pad_index)), constant_values=-1
  )
  keys = c.reshape(B * S, LATENT), k_r.reshape(B * S, ROPE)
  out = _attend(flat(q_c), flat(q_r), *keys, at, scale)
  return out[:, :H].reshape(B, T, H, LATENT)


def _in_parts(run: Callable, own: tuple[jax.Array, ...]) -> Any:
  """Returns run(*own) on queries [N ...], as many at a time as a grid has."""
  starts = range(0, own[0].shape[0], MOST)
  parts = [run(*(a[start : start + MOST] for a in own)) for start in starts]
  return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  at: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the output alone; its gradient is by the two other kernels."""
  return _fwd(q_c, q_r, c, k_r, at, scale)[0]


def _fwd(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  at: jax.Array,
  scale: float,
) -> tuple:
  """Returns the output and what the backward pass keeps."""
  run = lambda q_c, q_r, at: forward.attend(q_c, q_r, c, k_r, at, scale)
  out, lse = _in_parts(run, (q_c, q_r, at))
  return out, (q_c, q_r, c, k_r, at, out, lse)


def _bwd(scale: float, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of the queries, the latents and the keys."""
  q_c, q_r, c, k_r, at, out, lse = saved
  grad = grad.astype(jnp.bfloat16)
  # delta = <grad, out>: what the softmax's gradient subtracts in every row.
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  delta = product.sum(-1)  # [N H]
  own = (q_c, q_r, grad, lse, delta, at)
  run = lambda *own: query_gradient.queries(*own, c, k_r, scale)
  dq_c, dq_r = _in_parts(run, own)
  dc, dk_r = latent_gradient.latents(own, c, k_r, scale)
  return dq_c, dq_r, dc.astype(c.dtype), dk_r.astype(k_r.dtype), None


_attend.defvjp(_fwd, _bwd)
