"""Attention over gathered latents on Hopper: output and log-sum-exp.

A thread block holds 64 heads of one query and walks its latents 64 at a time,
two blocks in flight. Warpgroup w scores tokens [32 w, 32 w + 32) of a block,
the two exchange maxima and probabilities through shared memory, and then w sums
columns [256 w, 256 w + 256) over all 64: a 64 x 512 float32 output fits the
registers of no single warpgroup. Each gathers what it is the last to read,
which needs no warpgroup for loading and so leaves 255 registers a thread.
Legend: N queries of all rows, H heads (padded), K chosen (padded).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.sparse_mla.blocks import (
  BLOCK,
  BY_COLUMN,
  BY_ROW,
  EMPTY,
  HALF,
  HEADS,
  LOG2E,
  PART,
  ROPE,
  WGMMA,
  meet,
  memory,
  steps,
  wide,
)


def attend(q_c, q_r, c, k_r, at, scale):
  """Output [N H C] and base-2 log-sum-exp [N H] of the scaled scores."""
  N, H, _ = q_c.shape
  return compat.kernel(
    functools.partial(_body, scale=scale * LOG2E),
    (
      jax.ShapeDtypeStruct(q_c.shape, q_c.dtype),
      jax.ShapeDtypeStruct((N, H), jnp.float32),
    ),
    grid={'query': N, 'tile': H // HEADS},
    threads=2,
    across_warps=False,
    scratch={
      'qc': memory(2, HEADS, HALF),
      'qr': memory(HEADS, ROPE),
      # Stage, tokens, columns.
      'kc': memory(2, 2, 2, PART, HALF),
      'kr': memory(2, 2, PART, ROPE),
      'ps': memory(2, HEADS, PART),
      'stat': plgpu.SMEM((2, HEADS), jnp.float32),
      'q_here': plgpu.Barrier(num_arrivals=3),
      'k_here': plgpu.Barrier(num_arrivals=2),
      'max_here': plgpu.Barrier(num_arrivals=2),
      'p_here': plgpu.Barrier(num_arrivals=2),
    },
  )(q_c, q_r, c, k_r, at, steps(at, BLOCK))


def _body(
  q_c, q_r, c, k_r, at, steps, out, lse,
  qc, qr, kc, kr, ps, stat, q_here, k_here, max_here, p_here, *, scale,
):  # fmt: skip
  n, tile, w = (lax.axis_index(a) for a in ('query', 'tile', 'wg'))
  count, heads = steps[n], pl.ds(tile * HEADS, HEADS)

  @pl.when(w == 0)
  def _():
    for i in range(2):
      plgpu.copy_gmem_to_smem(
        q_c.at[n, heads, pl.ds(i * HALF, HALF)], qc.at[i], q_here
      )
    plgpu.copy_gmem_to_smem(q_r.at[n, heads], qr, q_here)

  def chosen(block, part):
    return n, pl.ds(block * BLOCK + part * PART, PART)

  def fetch(block):
    stage, columns = lax.rem(block, 2), pl.ds(w * HALF, HALF)

    @pl.when(block < count)
    def _():
      for part in range(2):
        gather.start(
          c.at[:, columns], at.at[chosen(block, part)], kc.at[stage, part, w]
        )
      gather.start(k_r, at.at[chosen(block, w)], kr.at[stage, w])

    gather.commit()

  lax.fori_loop(0, 2, lambda block, _: fetch(block), None)
  plgpu.barrier_wait(q_here)

  def scores(block, stage):
    def products(ref):
      # A loop, not two calls: unrolled, the descriptors spill (measured).
      def half(i, _):
        compat.wgmma(ref, qc.at[i], compat.transposed(kc.at[stage, w, i]))
        return ()

      lax.fori_loop(0, 2, half, ())
      compat.wgmma(ref, qr, compat.transposed(kr.at[stage, w]))
      return ref[...]

    s = pl.run_scoped(products, plgpu.ACC((HEADS, PART), jnp.float32)) * scale
    there = compat.load(at, chosen(block, w), BY_COLUMN, optimized=False)
    return jnp.where(wide(there, s.shape, 1) >= 0, s, -jnp.inf)

  def step(block, carry):
    acc, top, total = carry
    stage = lax.rem(block, 2)
    gather.wait(1)
    plgpu.commit_smem()
    meet(k_here)
    s = scores(block, stage)
    own = s.max(axis=1)
    stat[w] = own
    meet(max_here)
    other = compat.load(stat, 1 - w, BY_ROW)
    new_top = jnp.maximum(top, jnp.maximum(own, other))
    p = jnp.exp2(s - wide(new_top, s.shape))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    meet(p_here)
    acc = acc * wide(shrink, acc.shape)

    def weigh(ref):
      for part in range(2):
        compat.wgmma(ref, ps.at[part], kc.at[stage, part, w])
      plgpu.wgmma_wait(0)

    acc = compat.accumulate(acc, weigh)
    plgpu.commit_smem()  # every warp is done reading what is fetched over
    fetch(block + 2)
    return acc, new_top, total

  acc, top, total = lax.fori_loop(
    0,
    count,
    step,
    (
      compat.full((HEADS, HALF), 0.0, WGMMA),
      compat.full((HEADS,), EMPTY, BY_ROW),
      compat.full((HEADS,), 0.0, BY_ROW),
    ),
  )
  stat[w] = total
  meet(max_here)
  total = total + compat.load(stat, 1 - w, BY_ROW)
  safe = jnp.where(total > 0, total, 1.0)
  qc[w] = (acc / wide(safe, acc.shape)).astype(jnp.bfloat16)
  meet(p_here)  # both have read the sums

  @pl.when(w == 0)
  def _():
    stat[0] = top + jnp.log2(safe)

  plgpu.commit_smem()
  columns = pl.ds(w * HALF, HALF)
  plgpu.copy_smem_to_gmem(qc.at[w], out.at[n, heads, columns])
  pl.when(w == 0)(lambda: plgpu.copy_smem_to_gmem(stat.at[0], lse.at[n, heads]))
  plgpu.wait_smem_to_gmem(0)
