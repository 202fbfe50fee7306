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
  BLOCK,
  BY_COLUMN,
  BY_ROW,
  LOG2E,
  ROWS,
  STAGES,
  TILE,
  VALUE,
  WGMMA,
  WIDE,
)


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
      'ds': causal_blocks.memory(2, ROWS, BLOCK),
      'own_here': plgpu.Barrier(num_arrivals=2, num_barriers=2),
      'here': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    },
  )(q, k, v, grad, lse, delta, starts)


def _queries_body(
  q: jax.Ref, k: jax.Ref, v: jax.Ref, grad: jax.Ref, lse: jax.Ref,
  delta: jax.Ref, starts: jax.Ref, out: jax.Ref, qs: jax.Ref, gs: jax.Ref,
  ks: jax.Ref, vs: jax.Ref, ds: jax.Ref, own_here: jax.Ref, here: jax.Ref,
  free: jax.Ref, *, scale: float,
) -> None:  # fmt: skip
  """Computes the gradient of 128 queries, walking their keys."""
  b, h, m, w = causal_blocks.place(q.shape[1] // TILE)
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  # Load: queries and their gradients stay, keys and values stream.
  plgpu.copy_gmem_to_smem(q.at[b, rows, h], qs.at[w], own_here.at[w])
  plgpu.copy_gmem_to_smem(grad.at[b, rows, h], gs.at[w], own_here.at[w])
  first = lax.div(starts[b, m * TILE], BLOCK)
  steps = (m + 1) * (TILE // BLOCK) - first
  by_row = lambda ref, *at: compat.load(ref, at, BY_ROW, optimized=False)
  begin = by_row(starts, b, rows)
  norm, shift = by_row(lse, b, h, rows), by_row(delta, b, h, rows)

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds((first + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(k.at[b, where, h], ks.at[stage], here.at[stage])
    plgpu.copy_gmem_to_smem(v.at[b, where, h], vs.at[stage], here.at[stage])

  def use(i: jax.Array, stage: jax.Array, acc: jax.Array) -> jax.Array:
    # Probabilities: recomputed, from the stored log-sum-exp at once.
    plgpu.barrier_wait(here.at[stage])
    s = causal_blocks.product(qs.at[w], ks.at[stage], BLOCK) * (scale * LOG2E)
    key = causal_blocks.iota(s.shape, 1, (first + i) * BLOCK)
    seen = (key <= causal_blocks.iota(s.shape, 0, top_row)) & (
      key >= causal_blocks.wide(begin, s.shape)
    )
    p = jnp.exp2(
      jnp.where(seen, s, -jnp.inf) - causal_blocks.wide(norm, s.shape)
    )
    # Gradient of the scores: p (dp - delta).
    dp = causal_blocks.product(gs.at[w], vs.at[stage], BLOCK)
    ds[w] = (p * (dp - causal_blocks.wide(shift, p.shape))).astype(ds.dtype)
    plgpu.commit_smem()
    # Sum: what these keys add to the queries' gradient.
    return causal_blocks.add_product(acc, ds.at[w], ks.at[stage])

  plgpu.barrier_wait(own_here.at[w])
  acc = causal_blocks.stream(steps, load, use, causal_blocks.zeros(WIDE), free)
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
      'qs': causal_blocks.memory(STAGES, BLOCK, WIDE),
      'gs': causal_blocks.memory(STAGES, BLOCK, VALUE),
      'ps': causal_blocks.memory(2, ROWS, BLOCK),
      'norms': plgpu.SMEM((STAGES, BLOCK), jnp.float32),
      'shifts': plgpu.SMEM((STAGES, BLOCK), jnp.float32),
      'own_here': plgpu.Barrier(num_arrivals=2, num_barriers=2),
      'here': plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    },
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
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  # Load: keys and values stay, queries and their gradients stream.
  plgpu.copy_gmem_to_smem(k.at[b, rows, h], ks.at[w], own_here.at[w])
  plgpu.copy_gmem_to_smem(v.at[b, rows, h], vs.at[w], own_here.at[w])
  first = m * (TILE // BLOCK)
  # Queries behind the last key's segment don't attend to any of these.
  steps = lax.div(ends[b, m * TILE + TILE - 1], BLOCK) + 1 - first
  end = compat.load(ends, (b, rows), BY_ROW, optimized=False)
  start = causal_blocks.iota((ROWS, 8), 0, top_row).max(axis=1)

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds((first + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q.at[b, where, h], qs.at[stage], here.at[stage])
    plgpu.copy_gmem_to_smem(grad.at[b, where, h], gs.at[stage], here.at[stage])
    for vector, copy in ((lse, norms), (delta, shifts)):
      plgpu.copy_gmem_to_smem(
        vector.at[b, h, where], copy.at[stage], here.at[stage]
      )

  def by_query(
    ref: jax.Ref, stage: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    return causal_blocks.wide(compat.load(ref, stage, BY_COLUMN), shape, 1)

  def use(i: jax.Array, stage: jax.Array, carry: tuple) -> tuple:
    acc_k, acc_v = carry
    # Probabilities: recomputed, transposed: a row is a key.
    plgpu.barrier_wait(here.at[stage])
    s = causal_blocks.product(ks.at[w], qs.at[stage], BLOCK) * (scale * LOG2E)
    # Bounds by row, columns from 0: two positions per entry would spill.
    base = (first + i) * BLOCK
    column = causal_blocks.iota(s.shape, 1, 0)
    seen = (column >= causal_blocks.wide(start - base, s.shape)) & (
      column <= causal_blocks.wide(end - base, s.shape)
    )
    p = jnp.exp2(jnp.where(seen, s, -jnp.inf) - by_query(norms, stage, s.shape))
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    # Sum: the values' gradient, p times the output's gradient.
    acc_v = causal_blocks.add_product(acc_v, ps.at[w], gs.at[stage])
    dp = causal_blocks.product(vs.at[w], gs.at[stage], BLOCK)
    # Read back rather than kept: it would spill.
    p = compat.load(ps, w, WGMMA).astype(jnp.float32)
    # Gradient of the scores, and from it that of the keys.
    d = p * (dp - by_query(shifts, stage, p.shape))
    ps[w] = d.astype(jnp.bfloat16)
    plgpu.commit_smem()
    return causal_blocks.add_product(acc_k, ps.at[w], qs.at[stage]), acc_v

  plgpu.barrier_wait(own_here.at[w])
  carry = (causal_blocks.zeros(WIDE), causal_blocks.zeros(VALUE))
  acc_k, acc_v = causal_blocks.stream(steps, load, use, carry, free)
  # Store: by the tiles of keys and values, which are no longer needed.
  ks[w] = (acc_k * scale).astype(jnp.bfloat16)
  vs[w] = acc_v.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(ks.at[w], dk.at[b, rows, h])
  plgpu.copy_smem_to_gmem(vs.at[w], dv.at[b, rows, h])
  plgpu.wait_smem_to_gmem(0)
