"""Shares of the chosen latents in the attention of all heads, on Hopper.

A thread block takes 64 latents of a query and walks its heads 32 at a time,
each warpgroup every other 32 with tiles of its own; they meet at the end alone.
Probabilities are recomputed from the log-sum-exp, and keys times queries are
scored, not queries times keys, so that heads lie along wgmma's rows, where sums
need no other warp.
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
from pallas_kernels.latent_blocks import BY_COLUMN, BY_ROW, LOG2E
from pallas_kernels.sparse_mla.gathered_blocks import (
  BLOCK,
  PART,
  THIN,
  memory,
  product,
  steps,
)
from pallas_kernels.warpgroups import meet, wide


def shares(
  q_c: jax.Array,
  q_r: jax.Array | None,
  lse: jax.Array,
  at: jax.Array,
  c: jax.Array,
  k_r: jax.Array | None,
  scale: float,
) -> jax.Array:
  """Returns the sum over heads of exp2(score - lse), [N K] float32.

  What stands at no choice, or behind a query's last one, is arbitrary.

  Args:
    q_c, q_r: [N H C] and [N H R] bfloat16 queries, H a multiple of 64.
    lse: [N H] float32, base 2; a head of 1e30 counts nothing.
    at: [N K] int32 rows of the latents; negative for no choice.
    c, k_r: [M C] and [M R] bfloat16 latents.
    scale: of the scores.
  """
  (N, K), half = at.shape, c.shape[1] // 2
  rope = {}
  if q_r is not None:
    rope = {'kr': memory(2, BLOCK, THIN), 'qr': memory(2, 2, 2, PART, THIN)}
  return compat.kernel(
    functools.partial(_body, scale=scale * LOG2E),
    jax.ShapeDtypeStruct((N, K), jnp.float32),
    grid={'query': N, 'block': K // BLOCK},
    threads=2,
    across_warps=False,
    scratch={
      'kc': memory(2, BLOCK, half),
      'qc': memory(2, 2, 2, PART, half),  # warpgroup, stage, columns
      **rope,
      'sums': plgpu.SMEM((2, BLOCK), jnp.float32),
      'met': plgpu.Barrier(num_arrivals=2),
      # Warpgroup and stage: each loads and awaits its own.
      'here': plgpu.Barrier(num_arrivals=4 if rope else 2, num_barriers=4),
    },
  )(q_c, q_r, lse, at, steps(at, BLOCK), c, k_r)


def _body(
  q_c: jax.Ref, q_r: jax.Ref | None, lse: jax.Ref, at: jax.Ref,
  steps: jax.Ref, c: jax.Ref, k_r: jax.Ref | None, out: jax.Ref, *,
  scale: float, **scratch: jax.Ref
) -> None:  # fmt: skip
  """Computes one block of 64 choices, if the query has that many."""
  n, block = lax.axis_index('query'), lax.axis_index('block')

  @pl.when(block < steps[n])
  def _():
    where = {'n': n, 'block': block}
    _one_block(q_c, q_r, lse, at, c, k_r, out, **scratch, **where, scale=scale)


def _one_block(
  q_c: jax.Ref, q_r: jax.Ref | None, lse: jax.Ref, at: jax.Ref, c: jax.Ref,
  k_r: jax.Ref | None, out: jax.Ref, kc: jax.Ref, qc: jax.Ref, sums: jax.Ref,
  met: jax.Ref, here: jax.Ref, kr: jax.Ref | None = None,
  qr: jax.Ref | None = None, *, n: jax.Array, block: jax.Array, scale: float,
) -> None:  # fmt: skip
  """Computes the shares of 64 latents of a query."""
  w, parts = lax.axis_index('wg'), q_c.shape[1] // (2 * PART)
  chosen, half = (n, pl.ds(block * BLOCK, BLOCK)), kc.shape[-1]
  rope = q_r is not None
  # Load: 64 latents stay, half of the columns by each warpgroup.
  gather.start(c.at[:, pl.ds(w * half, half)], at.at[chosen], kc.at[w])
  if rope:
    gather.start(k_r.at[:, pl.ds(w * THIN, THIN)], at.at[chosen], kr.at[w])
  gather.commit()

  def heads(i: jax.Array) -> pl.Slice:
    return pl.ds((2 * i + w) * PART, PART)

  def load(i: jax.Array) -> None:
    stage = lax.rem(i, 2)
    turned = ((q_r, qr, THIN),) if rope else ()
    for source, dest, width in ((q_c, qc, half), *turned):
      for side in range(2):
        plgpu.copy_gmem_to_smem(
          source.at[n, heads(i), pl.ds(side * width, width)],
          dest.at[w, stage, side],
          here.at[2 * w + stage],
        )

  lax.fori_loop(0, min(2, parts), lambda i, _: load(i), None)
  # Wait: each warpgroup has its columns, then both have all.
  gather.wait(0)
  plgpu.commit_smem()
  meet(met)

  def step(i: jax.Array, total: jax.Array) -> jax.Array:
    stage = lax.rem(i, 2)
    norm = compat.load(lse, (n, heads(i)), BY_COLUMN, optimized=False)
    plgpu.barrier_wait(here.at[2 * w + stage])
    # Probabilities: recomputed, from the stored log-sum-exp at once.
    turned = (kr, qr.at[w, stage]) if rope else (None, None)
    s = product((kc, qc.at[w, stage]), turned) * scale
    p = jnp.exp2(s - wide(norm, s.shape, 1))
    # Refill: every warp is done reading the tile that is loaded over.
    plgpu.commit_smem()
    pl.when(i + 2 < parts)(lambda: load(i + 2))
    return total + p.sum(axis=1)

  zero = compat.full((BLOCK,), 0.0, BY_ROW)
  total = lax.fori_loop(0, parts, step, zero)
  # Store: the sum of both warpgroups' heads.
  sums[w] = total
  meet(met)

  @pl.when(w == 0)
  def _():
    both = total + compat.load(sums, 1, BY_ROW)
    sums[0] = both
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums.at[0], out.at[chosen])
    plgpu.wait_smem_to_gmem(0)
