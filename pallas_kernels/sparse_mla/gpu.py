"""Attention over gathered latents on Hopper, forward and backward.

This module prepares the inputs of the kernels: heads and choices padded to
multiples of 64, and the latents of all rows in one list.
Legend: N queries of all rows, M latents of all rows, H heads (padded), K chosen
(padded), C latent, R rope dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.latent_blocks import EMPTY, LATENT, LOG2E, ROPE
from pallas_kernels.sparse_mla import (
  forward,
  latent_gradient,
  query_gradient,
  query_shares,
)
from pallas_kernels.sparse_mla.forward import Latents
from pallas_kernels.sparse_mla.gathered_blocks import BLOCK, HEADS
from pallas_kernels.sparse_mla.keys import ChosenKeys
from pallas_kernels.sparse_mla.reference import NONE

MOST = 65_535  # queries of one call: so far a grid goes in all but one axis
WIDTHS = (LATENT, LATENT // 2)


def sparse_mla(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: tuple[ChosenKeys, ...],
  sinks: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention [B T H C], bfloat16, and log-sum-exp [B T H]."""
  _check(q_c, q_r, keys)
  B, T, H, _ = q_c.shape
  # Padded heads are dropped below; padded choices choose nothing.
  pad_heads = -H % HEADS
  flat = lambda q: jnp.pad(
    q.reshape(B * T, H, -1), ((0, 0), (0, pad_heads), (0, 0))
  )
  queries = jax.tree.map(flat, (q_c, q_r))
  lists = tuple(_in_one_list(one[:2]) for one in keys)
  ats = tuple(map(_places, keys))
  if sinks is not None:
    sinks = jnp.pad(sinks.astype(jnp.float32), (0, pad_heads))
  out, lse = _attend(*queries, lists, ats, sinks, scale)
  log_sum = jnp.where(lse > EMPTY / 2, lse * math.log(2), NONE)
  shaped = lambda a: a[:, :H].reshape(B, T, H, *a.shape[2:])
  return shaped(out), shaped(log_sum)


def shares(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: ChosenKeys,
  log_sum: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the mean over heads of the attention to each choice, [B T K]."""
  _check(q_c, q_r, (keys,))
  B, T, H, _ = q_c.shape
  flat = lambda a, value=0: jnp.pad(
    a.reshape(B * T, H, *a.shape[3:]),
    ((0, 0), (0, -H % HEADS), *((0, 0),) * (a.ndim - 3)),
    constant_values=value,
  )
  # Of padded heads no probability is above 0.
  lse = flat(log_sum.astype(jnp.float32) * LOG2E, -EMPTY)
  at, latents = _places(keys), _in_one_list(keys[:2])
  run = lambda *own: query_shares.shares(*own, *latents, scale)
  found = _in_parts(run, (*jax.tree.map(flat, (q_c, q_r)), lse, at))
  found = jnp.where(at >= 0, found, 0.0) / H
  return found[:, : keys.index.shape[2]].reshape(keys.index.shape)


def _check(
  q_c: jax.Array, q_r: jax.Array | None, keys: tuple[ChosenKeys, ...]
) -> None:
  """Raises NotImplementedError for what the kernels can't take."""
  for queries in jax.tree.leaves((q_c, q_r)):
    for one in keys:
      check_latents(queries.dtype, *one[:2])


def check_latents(
  queries: jnp.dtype, c: jax.Array, k_r: jax.Array | None
) -> None:
  """Raises NotImplementedError for latents that the kernels can't take.

  Args:
    queries: their dtype.
    c, k_r: [... C] and [... R], or None.
  """
  for dtype in (queries, *(a.dtype for a in jax.tree.leaves((c, k_r)))):
    if dtype != jnp.bfloat16:
      raise NotImplementedError(f'dtype {queries}/{c.dtype}, not bfloat16')
  width, rope = c.shape[-1], 0 if k_r is None else k_r.shape[-1]
  if width not in WIDTHS or rope not in (0, ROPE):
    raise NotImplementedError(
      f'latent {width} and rope {rope}, not {LATENT} or {LATENT // 2} and'
      f' {ROPE} or none'
    )


def _in_one_list(latents: tuple) -> Latents:
  """Returns the latents of all rows: row b begins at S b."""
  return Latents(*jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), latents))


def _places(keys: ChosenKeys) -> jax.Array:
  """Returns what queries choose of the list of all rows, [N K]."""
  (B, S), (_, T, K) = keys.c.shape[:2], keys.index.shape
  row = jnp.arange(B, dtype=jnp.int32)[:, None, None] * S
  at = jnp.where(keys.index >= 0, keys.index + row, -1).reshape(B * T, K)
  return jnp.pad(at, ((0, 0), (0, -K % BLOCK)), constant_values=-1)


def _in_parts(run: Callable, own: tuple) -> Any:
  """Returns run(*own) on queries [N ...], as many at a time as a grid has."""
  starts = range(0, own[0].shape[0], MOST)
  part = lambda start: jax.tree.map(lambda a: a[start : start + MOST], own)
  parts = [run(*part(start)) for start in starts]
  return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _in_log_2(sinks: jax.Array | None) -> jax.Array | None:
  """Returns sinks as the kernel takes them: in units of log 2, and finite."""
  return None if sinks is None else jnp.maximum(sinks * LOG2E, EMPTY)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
  q_c: jax.Array,
  q_r: jax.Array | None,
  lists: tuple[Latents, ...],
  ats: tuple[jax.Array, ...],
  sinks: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and its log-sum-exp, which has no gradient."""
  return _fwd(q_c, q_r, lists, ats, sinks, scale)[0]


def _fwd(
  q_c: jax.Array,
  q_r: jax.Array | None,
  lists: tuple[Latents, ...],
  ats: tuple[jax.Array, ...],
  sinks: jax.Array | None,
  scale: float,
) -> tuple:
  """Returns output and log-sum-exp, and what the backward pass keeps."""
  finite = _in_log_2(sinks)
  run = lambda q_c, q_r, ats: forward.attend(
    q_c, q_r, lists, ats, finite, scale
  )
  out, lse = _in_parts(run, (q_c, q_r, ats))
  return (out, lse), (q_c, q_r, lists, ats, sinks, out, lse)


def _bwd(scale: float, saved: tuple, grads: tuple) -> tuple:
  """Returns the gradients of queries, latents, keys and sinks."""
  q_c, q_r, lists, ats, sinks, out, lse = saved
  grad = grads[0].astype(jnp.bfloat16)
  # delta = <grad, out>: what the softmax's gradient subtracts in every row.
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  delta = product.sum(-1)  # [N H]
  # Two lists are one here: the second goes on where the first ends.
  sizes = [one.c.shape[0] for one in lists]
  first = sizes[0]
  c, k_r = jax.tree.map(lambda *a: jnp.concatenate(a), *lists)
  at = jnp.concatenate(
    [ats[0], *(jnp.where(a >= 0, a + first, -1) for a in ats[1:])], axis=1
  )
  own = (q_c, q_r, grad, lse, delta, at)
  run = lambda *own: query_gradient.queries(*own, c, k_r, scale)
  dq_c, dq_r = _in_parts(run, own)
  totals = latent_gradient.latents(own, c, k_r, scale)
  parts = jax.tree.map(
    lambda total, a: jnp.split(total.astype(a.dtype), [first])[: len(lists)],
    totals,
    (c, k_r),
  )
  d_lists = tuple(
    Latents(parts[0][i], None if k_r is None else parts[1][i])
    for i in range(len(lists))
  )
  d_sinks = None
  if sinks is not None:
    # What a sink takes of 1 it takes from every value.
    share = jnp.exp2(_in_log_2(sinks) - lse)
    d_sinks = -(share * delta).sum(0)
  return dq_c, dq_r, d_lists, tuple(None for _ in ats), d_sinks


_attend.defvjp(_fwd, _bwd)
