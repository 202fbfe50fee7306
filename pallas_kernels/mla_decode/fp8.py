"""Absorbed latent attention over float8 latents, in Triton.

Shared memory of Hopper holds either the float8 pages that arrive or their
bfloat16 copies that tensor cores multiply, beside 64 queries of 512: not both
twice over. Triton takes latents straight into registers, 128 columns and one
scale at a time, so a block is read, scaled, multiplied and weighed by columns.
Splits are merged as in the bfloat16 kernel.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize.reference import FP8

ROWS, BLOCK, LATENT, ROPE, GROUP = 64, 64, 512, 64, 128
EMPTY = -1e30  # running maximum of a row that has seen no key yet


def supported(q_c, c, scales, k_r):
  if c.dtype != FP8 or scales.dtype != jnp.float32:
    raise NotImplementedError(
      f'latents {c.dtype} with scales {scales.dtype}, not float8_e4m3fn and '
      'float32'
    )
  if q_c.dtype != jnp.bfloat16 or k_r.dtype != jnp.bfloat16:
    raise NotImplementedError(f'dtype {q_c.dtype}/{k_r.dtype}, not bfloat16')
  if (q_c.shape[-1], k_r.shape[-1]) != (LATENT, ROPE):
    raise NotImplementedError(
      f'latent {q_c.shape[-1]} and rope {k_r.shape[-1]}, not 512 and 64'
    )
  if c.shape[1] % BLOCK:
    raise NotImplementedError(f'{c.shape[1]} tokens a page, not 64 * n')


def partial_sums(
  q_c, q_r, c, scales, k_r, table, lengths, row_new, *, scale, splits, new
):
  """Attention of each split alone: out [B splits rows C], lse base 2."""
  B, rows, _ = q_c.shape
  body = functools.partial(
    _body, scale=scale * math.log2(math.e), splits=splits, new=new
  )
  return compat.triton_kernel(
    body,
    (
      jax.ShapeDtypeStruct((B, splits, rows, LATENT), jnp.bfloat16),
      jax.ShapeDtypeStruct((B, splits, rows), jnp.float32),
    ),
    grid=(B, rows // ROWS, splits),
    warps=8,
    stages=2,
  )(q_c, q_r, c, scales, k_r, table, lengths, row_new)


def _dot(a, b, contract):
  return lax.dot_general(
    a, b, (contract, ((), ())), preferred_element_type=jnp.float32
  )


def _body(
  q_c, q_r, c, scales, k_r, table, lengths, row_new, out, lse,
  *, scale, splits, new,
):  # fmt: skip
  b, tile, split = (pl.program_id(axis) for axis in range(3))
  rows = pl.ds(tile * ROWS, ROWS)
  length, page = lengths[b], c.shape[1]
  blocks = (length + BLOCK - 1) // BLOCK
  per_split = (blocks + splits - 1) // splits
  first = split * per_split
  last = jnp.minimum(first + per_split, blocks)
  groups = [pl.ds(i * GROUP, GROUP) for i in range(LATENT // GROUP)]
  queries = [q_c[b, rows, group] for group in groups]
  turned = q_r[b, rows]
  seen = row_new[rows] + (length - (new - 1))

  def step(i, carry):
    sums, top, total = carry
    place = i * BLOCK
    here = table[b, place // page], pl.ds(place % page, BLOCK)
    s = _dot(turned, k_r[here], ((1,), (1,)))
    keys = []
    for j, group in enumerate(groups):
      key = c[(*here, group)].astype(jnp.float32) * scales[(*here, j)][:, None]
      keys.append(key.astype(jnp.bfloat16))
      s += _dot(queries[j], keys[-1], ((1,), (1,)))
    key_at = place + jnp.arange(BLOCK)
    s = jnp.where(key_at[None] < seen[:, None], s * scale, -jnp.inf)
    # What lies behind the length is arbitrary, and 0 * nan is nan.
    real = (key_at < length)[:, None]
    new_top = jnp.maximum(top, s.max(axis=1))
    p = jnp.exp2(s - new_top[:, None])
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    p = p.astype(jnp.bfloat16)
    sums = tuple(
      part * shrink[:, None]
      + _dot(p, jnp.where(real, key, 0).astype(key.dtype), ((1,), (0,)))
      for part, key in zip(sums, keys)
    )
    return sums, new_top, total

  zero = jnp.zeros((ROWS, GROUP), jnp.float32)
  sums, top, total = lax.fori_loop(
    first,
    last,
    step,
    (
      (zero,) * len(groups),
      jnp.full((ROWS,), EMPTY, jnp.float32),
      jnp.zeros((ROWS,), jnp.float32),
    ),
  )
  safe = jnp.where(total > 0, total, 1.0)
  for group, part in zip(groups, sums):
    out[b, split, rows, group] = (part / safe[:, None]).astype(out.dtype)
  lse[b, split, rows] = jnp.where(total > 0, top + jnp.log2(safe), EMPTY)
