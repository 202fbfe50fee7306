"""Gradient of the queries of attention over gathered latents on Hopper.

A thread block holds 64 heads of a query and their gradient, and walks its
latents 32 at a time, two blocks in flight. Warpgroup 0 computes probabilities
(again, as in FlashAttention-2, arXiv:2307.08691), warpgroup 1 their gradients,
and each sums half of the columns.
Legend: N queries of all rows, H heads (padded), K chosen (padded).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.latent_blocks import (
  BY_COLUMN,
  BY_ROW,
  HALF,
  LOG2E,
  WGMMA,
  add,
  meet,
  wide,
)
from pallas_kernels.sparse_mla.gathered_blocks import (
  HEADS,
  PART,
  THIN,
  mask_unchosen,
  memory,
  product,
  shared_pair,
  steps,
  zeros,
)


def queries(
  q_c: jax.Array,
  q_r: jax.Array,
  grad: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  at: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of q_c [N H C] and q_r [N H R]."""
  N, H, _ = q_c.shape
  return compat.kernel(
    functools.partial(_queries_body, scale=scale),
    (
      jax.ShapeDtypeStruct(q_c.shape, q_c.dtype),
      jax.ShapeDtypeStruct(q_r.shape, q_r.dtype),
    ),
    grid={'query': N, 'tile': H // HEADS},
    threads=2,
    across_warps=False,
    scratch={
      'qc': memory(2, HEADS, HALF),
      'qr': memory(2, HEADS, THIN),
      'gc': memory(2, HEADS, HALF),
      'kc': memory(2, 2, PART, HALF),  # stage, columns
      'kr': memory(2, 2, PART, THIN),
      **shared_pair(),
      'own_here': plgpu.Barrier(num_arrivals=6),
    },
  )(q_c, q_r, grad, lse, delta, at, steps(at, PART), c, k_r)


def _queries_body(
  q_c: jax.Ref, q_r: jax.Ref, grad: jax.Ref, lse: jax.Ref, delta: jax.Ref,
  at: jax.Ref, steps: jax.Ref, c: jax.Ref, k_r: jax.Ref, dq_c: jax.Ref,
  dq_r: jax.Ref, qc: jax.Ref, qr: jax.Ref, gc: jax.Ref, kc: jax.Ref,
  kr: jax.Ref, ps: jax.Ref, ds: jax.Ref, p_here: jax.Ref, met: jax.Ref,
  own_here: jax.Ref, *, scale: float,
) -> None:  # fmt: skip
  """Computes the gradients of 64 heads of a query, walking its latents."""
  n, tile, w = (lax.axis_index(a) for a in ('query', 'tile', 'wg'))
  count, heads = steps[n], pl.ds(tile * HEADS, HEADS)
  columns, thin = pl.ds(w * HALF, HALF), pl.ds(w * THIN, THIN)
  # Load: queries and their gradients stay, latents stream past them.
  for source, dest, part in (
    (q_c, qc, columns),
    (q_r, qr, thin),
    (grad, gc, columns),
  ):
    plgpu.copy_gmem_to_smem(source.at[n, heads, part], dest.at[w], own_here)

  def chosen(block: jax.Array) -> tuple:
    return n, pl.ds(block * PART, PART)

  def fetch(block: jax.Array) -> None:
    stage = lax.rem(block, 2)

    @pl.when(block < count)
    def _():
      rows = at.at[chosen(block)]
      gather.start(c.at[:, columns], rows, kc.at[stage, w])
      gather.start(k_r.at[:, thin], rows, kr.at[stage, w])

    gather.commit()

  lax.fori_loop(0, 2, lambda block, _: fetch(block), None)
  plgpu.barrier_wait(own_here)
  norm, shift = (
    compat.load(ref, (n, heads), BY_ROW, optimized=False)
    for ref in (lse, delta)
  )

  def step(block: jax.Array, carry: tuple) -> tuple:
    stage = lax.rem(block, 2)
    # Wait: each warpgroup has its columns, then both have all.
    gather.wait(1)
    plgpu.commit_smem()
    meet(met)

    @pl.when(w == 0)
    def _():
      # Probabilities: recomputed, from the stored log-sum-exp at once.
      s = product((qc, kc.at[stage]), (qr, kr.at[stage])) * (scale * LOG2E)
      there = compat.load(at, chosen(block), BY_COLUMN, optimized=False)
      s = mask_unchosen(s, there, 1)
      ps[...] = jnp.exp2(s - wide(norm, s.shape)).astype(ps.dtype)
      plgpu.commit_smem()
      plgpu.barrier_arrive(p_here)

    @pl.when(w == 1)
    def _():
      # Gradient of the scores: p (dp - delta).
      dp = product((gc, kc.at[stage]))
      plgpu.barrier_wait(p_here)
      p = compat.load(ps, slice(None), WGMMA).astype(jnp.float32)
      ds[...] = (p * (dp - wide(shift, dp.shape))).astype(ds.dtype)
      plgpu.commit_smem()

    meet(met)
    # Sum: what these latents add to the queries' gradient.
    acc_c = add(carry[0], (ds, kc.at[stage, w]))
    acc_r = add(carry[1], (ds, kr.at[stage, w]))
    plgpu.commit_smem()  # every warp is done reading what is fetched over
    fetch(block + 2)
    return acc_c, acc_r

  acc_c, acc_r = lax.fori_loop(0, count, step, zeros())
  # Store: by the tiles of the queries, which are no longer needed.
  qc[w] = (acc_c * scale).astype(jnp.bfloat16)
  qr[w] = (acc_r * scale).astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(qc.at[w], dq_c.at[n, heads, columns])
  plgpu.copy_smem_to_gmem(qr.at[w], dq_r.at[n, heads, thin])
  plgpu.wait_smem_to_gmem(0)
