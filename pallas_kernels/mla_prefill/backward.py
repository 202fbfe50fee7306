"""Gradients of causal attention 192/128 on Hopper.

Two kernels: gradient of the queries, walking the keys; gradient of keys and
values, walking the queries. Scores are recomputed, as in FlashAttention-2
(arXiv:2307.08691).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.mla_prefill import causal_blocks
from pallas_kernels.mla_prefill.causal_blocks import (
  BY_COLUMN,
  BY_ROW,
  LOG2E,
  ROWS,
  TILE,
  VALUE,
  WIDE,
)
from pallas_kernels.warpgroups import wide

BLOCK, STAGES = 64, 3
FEWER = 2  # stages where a third would spill registers


def queries(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  grad: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  starts: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the gradient of the queries [B T H 192]."""
  return compat.kernel(
    functools.partial(_queries_body, scale=scale),
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=causal_blocks.grid(q),
    threads=2,
    scratch={
      'qs': causal_blocks.memory(2, ROWS, WIDE),
      'gs': causal_blocks.memory(2, ROWS, VALUE),
      'ks': causal_blocks.memory(STAGES, BLOCK, WIDE),
      'vs': causal_blocks.memory(STAGES, BLOCK, VALUE),
      **_barriers(STAGES, copies=2, own=2),
    },
    across_warps=False,
  )(q, k, v, grad, lse, delta, starts)


def _barriers(stages: int, copies: int, own: int) -> dict[str, plgpu.Barrier]:
  """Returns the barriers of both kernels.

  Args:
    stages: of the ring.
    copies: that fill one.
    own: copies of what stays.
  """
  return {
    'own_here': plgpu.Barrier(num_arrivals=own, num_barriers=2),
    'here': plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  }


def _queries_body(
  q: jax.Ref, k: jax.Ref, v: jax.Ref, grad: jax.Ref, lse: jax.Ref,
  delta: jax.Ref, starts: jax.Ref, out: jax.Ref, qs: jax.Ref, gs: jax.Ref,
  ks: jax.Ref, vs: jax.Ref, own_here: jax.Ref, here: jax.Ref, free: jax.Ref, *,
  scale: float,
) -> None:  # fmt: skip
  """Computes the gradient of 128 queries, walking their keys."""
  b, h, m, w = causal_blocks.place(q.shape[1] // TILE)
  walk = causal_blocks.past_keys(starts, b, m, BLOCK)
  # Load: queries and their gradients stay, keys and values stream.
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  plgpu.copy_gmem_to_smem(q.at[b, rows, h], qs.at[w], own_here.at[w])
  plgpu.copy_gmem_to_smem(grad.at[b, rows, h], gs.at[w], own_here.at[w])
  by_row = lambda ref, *at: compat.load(ref, at, BY_ROW, optimized=False)
  begin = by_row(starts, b, rows)
  norm, shift = by_row(lse, b, h, rows), by_row(delta, b, h, rows)

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds(i * BLOCK, BLOCK)
    for source, to in ((k, ks), (v, vs)):
      plgpu.copy_gmem_to_smem(
        source.at[b, where, h], to.at[stage], here.at[stage]
      )

  def use(i: jax.Array, stage: jax.Array, acc: jax.Array) -> jax.Array:
    def products(s: jax.Ref, dp: jax.Ref) -> tuple[jax.Array, jax.Array]:
      for to, a, b in ((s, qs, ks), (dp, gs, vs)):
        own = causal_blocks.parts_of(a.at[w])
        causal_blocks.add_scores(to, own, b.at[stage])
      return s[...], dp[...]

    # Scores again, and the gradient of the probabilities.
    plgpu.barrier_wait(here.at[stage])
    s, dp = pl.run_scoped(products, *2 * [causal_blocks.accumulator(BLOCK)])
    # Probabilities: from the stored log-sum-exp at once.
    mask = lambda s: causal_blocks.masked(s, i * BLOCK, top_row, begin)
    s = lax.cond(walk.needs_mask(i), mask, lambda s: s, s)
    p = jnp.exp2(s * (scale * LOG2E) - wide(norm, s.shape))
    # Gradient of the scores: p (dp - delta).
    d = p * (dp - wide(shift, p.shape))
    # Sum: what these keys add to the queries' gradient.
    return compat.add_product(acc, d.astype(jnp.bfloat16), ks.at[stage])

  plgpu.barrier_wait(own_here.at[w])
  acc = causal_blocks.stream(
    walk, STAGES, load, use, causal_blocks.zeros(WIDE), free
  )
  # Store: by the tile of the queries, which are no longer needed.
  qs[w] = (acc * scale).astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(qs.at[w], out.at[b, rows, h])
  plgpu.wait_smem_to_gmem(0)


def keys(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  grad: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  ends: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of the keys and of the values."""
  return compat.kernel(
    functools.partial(_keys_body, scale=scale),
    (
      jax.ShapeDtypeStruct(k.shape, k.dtype),
      jax.ShapeDtypeStruct(v.shape, v.dtype),
    ),
    grid=causal_blocks.grid(q),
    threads=2,
    scratch={
      'ks': causal_blocks.memory(2, ROWS, WIDE),
      'vs': causal_blocks.memory(2, ROWS, VALUE),
      'qs': causal_blocks.memory(FEWER, BLOCK, WIDE),
      'gs': causal_blocks.memory(FEWER, BLOCK, VALUE),
      'ps': causal_blocks.memory(2, ROWS, BLOCK),
      'norms': plgpu.SMEM((FEWER, BLOCK), jnp.float32),
      'shifts': plgpu.SMEM((FEWER, BLOCK), jnp.float32),
      **_barriers(FEWER, copies=4, own=2),
    },
    across_warps=False,
  )(q, k, v, grad, lse, delta, ends)


def _keys_body(
  q: jax.Ref, k: jax.Ref, v: jax.Ref, grad: jax.Ref, lse: jax.Ref,
  delta: jax.Ref, ends: jax.Ref, dk: jax.Ref, dv: jax.Ref, ks: jax.Ref,
  vs: jax.Ref, qs: jax.Ref, gs: jax.Ref, ps: jax.Ref, norms: jax.Ref,
  shifts: jax.Ref, own_here: jax.Ref, here: jax.Ref, free: jax.Ref, *,
  scale: float,
) -> None:  # fmt: skip
  """Computes the gradients of 128 keys and values, walking queries."""
  b, h, w = (lax.axis_index(a) for a in ('b', 'h', 'wg'))
  m = lax.axis_index('m')  # the first keys have the most queries
  walk = causal_blocks.past_queries(ends, b, m, BLOCK)

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds(i * BLOCK, BLOCK)
    for source, to in ((q, qs), (grad, gs)):
      plgpu.copy_gmem_to_smem(
        source.at[b, where, h], to.at[stage], here.at[stage]
      )
    for vector, to in ((lse, norms), (delta, shifts)):
      plgpu.copy_gmem_to_smem(
        vector.at[b, h, where], to.at[stage], here.at[stage]
      )

  def by_query(
    ref: jax.Ref, stage: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    return wide(compat.load(ref, stage, BY_COLUMN), shape, 1)

  # Load: keys and values stay, queries and their gradients stream.
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  plgpu.copy_gmem_to_smem(k.at[b, rows, h], ks.at[w], own_here.at[w])
  plgpu.copy_gmem_to_smem(v.at[b, rows, h], vs.at[w], own_here.at[w])

  end = compat.load(ends, (b, rows), BY_ROW, optimized=False)
  start = causal_blocks.iota((ROWS, 8), 0, top_row).max(axis=1)

  def mask(s: jax.Array, i: jax.Array) -> jax.Array:
    # Bounds by row, columns from 0: two positions per entry would spill.
    base, column = i * BLOCK, causal_blocks.iota(s.shape, 1, 0)
    seen = (column >= wide(start - base, s.shape)) & (
      column <= wide(end - base, s.shape)
    )
    return jnp.where(seen, s, -jnp.inf)

  def use(i: jax.Array, stage: jax.Array, carry: tuple) -> tuple:
    acc_k, acc_v = carry
    # Probabilities: recomputed, transposed: a row is a key.
    plgpu.barrier_wait(here.at[stage])
    s = causal_blocks.product(ks.at[w], qs.at[stage], BLOCK)
    s = lax.cond(walk.needs_mask(i), lambda s: mask(s, i), lambda s: s, s)
    p = jnp.exp2(s * (scale * LOG2E) - by_query(norms, stage, s.shape))
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    # Sum: the values' gradient, p times the output's gradient.
    acc_v = causal_blocks.add_product(acc_v, ps.at[w], gs.at[stage])
    dp = causal_blocks.product(vs.at[w], gs.at[stage], BLOCK)
    # Read back rather than kept: it would spill.
    p = compat.load(ps, w, causal_blocks.WGMMA).astype(jnp.float32)
    # Gradient of the scores, and from it that of the keys.
    d = p * (dp - by_query(shifts, stage, p.shape))
    ps[w] = d.astype(jnp.bfloat16)
    plgpu.commit_smem()
    acc_k = causal_blocks.add_product(acc_k, ps.at[w], qs.at[stage])
    return acc_k, acc_v

  plgpu.barrier_wait(own_here.at[w])
  carry = (causal_blocks.zeros(WIDE), causal_blocks.zeros(VALUE))
  acc_k, acc_v = causal_blocks.stream(walk, FEWER, load, use, carry, free)
  # Store: by the tiles of keys and values, which are no longer needed.
  ks[w] = (acc_k * scale).astype(jnp.bfloat16)
  vs[w] = acc_v.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(ks.at[w], dk.at[b, rows, h])
  plgpu.copy_smem_to_gmem(vs.at[w], dv.at[b, rows, h])
  plgpu.wait_smem_to_gmem(0)
