"""Attention over gathered latents on Hopper: output and log-sum-exp.

A thread block holds 64 heads of one query and walks its latents 64 at a time,
two blocks in flight. Warpgroup w scores tokens [32 w, 32 w + 32) of a block and
sums columns [256 w, 256 w + 256) over all 64 (see latent_blocks). Each gathers
the tiles that it is the last to read, which needs no warpgroup for loading and
so leaves 255 registers a thread.
Legend: N queries of all rows, H heads (padded), K chosen (padded).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather, latent_blocks
from pallas_kernels.latent_blocks import BY_COLUMN, HALF, LOG2E, ROPE
from pallas_kernels.sparse_mla.gathered_blocks import (
  BLOCK,
  HEADS,
  PART,
  mask_unchosen,
  memory,
  steps,
)


def attend(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  at: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [N H C] and log-sum-exp [N H] of the scaled scores.

  Args:
    q_c, q_r: [N H C] and [N H R] bfloat16 queries.
    c, k_r: [M C] and [M R] bfloat16, latents and rotary keys of all rows.
    at: [N K] int32 positions in those; negative for no choice.
    scale: of the scores.
  """
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
  q_c: jax.Ref, q_r: jax.Ref, c: jax.Ref, k_r: jax.Ref, at: jax.Ref,
  steps: jax.Ref, out: jax.Ref, lse: jax.Ref, qc: jax.Ref, qr: jax.Ref,
  kc: jax.Ref, kr: jax.Ref, ps: jax.Ref, stat: jax.Ref, q_here: jax.Ref,
  k_here: jax.Ref, max_here: jax.Ref, p_here: jax.Ref, *, scale: float,
) -> None:  # fmt: skip
  """Computes 64 heads of one query over all latents chosen for it."""
  n, tile, w = (lax.axis_index(a) for a in ('query', 'tile', 'wg'))
  count, heads = steps[n], pl.ds(tile * HEADS, HEADS)
  columns = pl.ds(w * HALF, HALF)

  def chosen(block: jax.Array, part: int | jax.Array) -> tuple:
    return n, pl.ds(block * BLOCK + part * PART, PART)

  def fetch(block: jax.Array) -> None:
    stage = lax.rem(block, 2)

    @pl.when(block < count)
    def _():
      for part in range(2):
        gather.start(
          c.at[:, columns], at.at[chosen(block, part)], kc.at[stage, part, w]
        )
      gather.start(k_r, at.at[chosen(block, w)], kr.at[stage, w])

    gather.commit()

  # Load: the queries stay, two blocks of latents are on their way.
  latent_blocks.load_queries(q_c, q_r, (n, heads), qc, qr, q_here)
  lax.fori_loop(0, 2, lambda block, _: fetch(block), None)
  plgpu.barrier_wait(q_here)

  def step(
    block: jax.Array, running: latent_blocks.Running
  ) -> latent_blocks.Running:
    stage = lax.rem(block, 2)
    # Wait: this warpgroup's rows are here, then both have theirs.
    gather.wait(1)
    plgpu.commit_smem()
    latent_blocks.meet(k_here)
    # Scores: this warpgroup's 32 tokens, all columns.
    latents = lambda i: kc.at[stage, w, i]
    s = latent_blocks.scores(qc, qr, latents, kr.at[stage, w], scale)
    there = compat.load(at, chosen(block, w), BY_COLUMN, optimized=False)
    s = mask_unchosen(s, there, 1)
    # Softmax: over all 64 tokens, so the maxima cross over.
    own = latent_blocks.publish_max(s, stat, max_here)
    shrink, running = latent_blocks.softmax_step(
      s, own, running, stat, ps, p_here
    )
    # Values: all 64 tokens, this warpgroup's columns.
    latents = lambda i: kc.at[stage, i, w]
    running = latent_blocks.weigh(running, shrink, ps, latents)
    # Refill: every warp is done reading the tiles that are fetched over.
    plgpu.commit_smem()
    fetch(block + 2)
    return running

  running = lax.fori_loop(0, count, step, latent_blocks.start())
  latent_blocks.finish(
    running,
    qc,
    stat,
    (max_here, p_here),
    out.at[n, heads, columns],
    lse.at[n, heads],
  )
