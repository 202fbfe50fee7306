"""Gradient of the queries of attention over gathered latents on Hopper.

A thread block holds 64 heads of a query and their gradient, and walks its
latents 32 at a time, two blocks in flight. Warpgroup 0 computes probabilities
(again, as in FlashAttention-2, arXiv:2307.08691), warpgroup 1 their gradients,
and each sums half of the columns.
Legend: N queries of all rows, H heads (padded), K chosen (padded), C latent,
R rope dim.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.latent_blocks import BY_COLUMN, BY_ROW, LOG2E, WGMMA, add
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
from pallas_kernels.warpgroups import meet, wide


def queries(
  q_c: jax.Array,
  q_r: jax.Array | None,
  grad: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  at: jax.Array,
  c: jax.Array,
  k_r: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the gradients of q_c [N H C] and q_r [N H R]."""
  N, H, C = q_c.shape
  half, rope = C // 2, {}
  if q_r is not None:
    # Stage, columns.
    rope = {'qr': memory(2, HEADS, THIN), 'kr': memory(2, 2, PART, THIN)}
  like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
  return compat.kernel(
    functools.partial(_queries_body, scale=scale),
    jax.tree.map(like, (q_c, q_r)),
    grid={'query': N, 'tile': H // HEADS},
    threads=2,
    across_warps=False,
    scratch={
      'qc': memory(2, HEADS, half),
      'gc': memory(2, HEADS, half),
      'kc': memory(2, 2, PART, half),
      **rope,
      **shared_pair(),
      'own_here': plgpu.Barrier(num_arrivals=6 if rope else 4),
    },
  )(q_c, q_r, grad, lse, delta, at, steps(at, PART), c, k_r)


def _queries_body(
  q_c: jax.Ref, q_r: jax.Ref | None, grad: jax.Ref, lse: jax.Ref,
  delta: jax.Ref, at: jax.Ref, steps: jax.Ref, c: jax.Ref,
  k_r: jax.Ref | None, dq_c: jax.Ref, dq_r: jax.Ref | None, qc: jax.Ref,
  gc: jax.Ref, kc: jax.Ref, ps: jax.Ref, ds: jax.Ref, p_here: jax.Ref,
  met: jax.Ref, own_here: jax.Ref, qr: jax.Ref | None = None,
  kr: jax.Ref | None = None, *, scale: float,
) -> None:  # fmt: skip
  """Computes the gradients of 64 heads of a query, walking its latents."""
  n, tile, w = (lax.axis_index(a) for a in ('query', 'tile', 'wg'))
  count, heads, half = steps[n], pl.ds(tile * HEADS, HEADS), qc.shape[-1]
  columns, thin = pl.ds(w * half, half), pl.ds(w * THIN, THIN)
  rope = q_r is not None
  # Load: queries and their gradients stay, latents stream past them.
  turned = ((q_r, qr, thin),) if rope else ()
  for source, dest, part in (
    (q_c, qc, columns),
    *turned,
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
      if rope:
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
      turned = qr, kr.at[stage] if rope else None
      s = product((qc, kc.at[stage]), turned) * (scale * LOG2E)
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
    acc_r = add(carry[1], (ds, kr.at[stage, w])) if rope else None
    plgpu.commit_smem()  # every warp is done reading what is fetched over
    fetch(block + 2)
    return acc_c, acc_r

  acc_c, acc_r = lax.fori_loop(0, count, step, zeros(half, rope))
  # Store: by the tiles of the queries, which are no longer needed.
  qc[w] = (acc_c * scale).astype(jnp.bfloat16)
  if rope:
    qr[w] = (acc_r * scale).astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(qc.at[w], dq_c.at[n, heads, columns])
  if rope:
    plgpu.copy_smem_to_gmem(qr.at[w], dq_r.at[n, heads, thin])
  plgpu.wait_smem_to_gmem(0)
