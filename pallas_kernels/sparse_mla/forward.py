"""Attention over gathered latents on Hopper: output and log-sum-exp.

A thread block holds 64 heads of one query and walks its latents 64 at a time,
two blocks in flight. Warpgroup w scores tokens [32 w, 32 w + 32) of a block and
sums half w of the columns over all 64 (see latent_blocks). Each gathers the
tiles that it is the last to read, which needs no warpgroup for loading and so
leaves 255 registers a thread. Few queries, as decoding has, leave most of a
device idle: then thread blocks share the choices of a query, and their parts
are merged by log-sum-exp.
Legend: N queries of all rows, H heads (padded), K chosen (padded), C latent,
h = C / 2, R rope dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather, latent_blocks
from pallas_kernels.latent_blocks import BY_COLUMN, BY_ROW, EMPTY, LOG2E, ROPE
from pallas_kernels.sparse_mla.gathered_blocks import (
  BLOCK,
  HEADS,
  PART,
  mask_unchosen,
  memory,
  steps,
)
from pallas_kernels.warpgroups import meet


class Latents(NamedTuple):
  """Holds the latents of all rows in one list, [M C] and [M R] bfloat16."""

  c: jax.Array
  k_r: jax.Array | None


def attend(
  q_c: jax.Array,
  q_r: jax.Array | None,
  lists: tuple[Latents, ...],
  ats: tuple[jax.Array, ...],
  sinks: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [N H C] and log-sum-exp [N H] (base 2) of the scores.

  Args:
    q_c, q_r: [N H C] and [N H R] bfloat16 queries.
    lists: one or two lists of latents.
    ats: for each [N K] int32 positions in it; negative for no choice.
    sinks: [H] float32, scores without a value in units of log 2, or None.
    scale: of the scores.
  """
  N, H, C = q_c.shape
  half, rope = C // 2, q_r is not None
  at = jnp.concatenate(ats, axis=1)
  splits = _pick_splits(N * H // HEADS, at.shape[1] // BLOCK)
  at = jnp.pad(
    at, ((0, 0), (0, -at.shape[1] % (splits * BLOCK))), constant_values=-1
  )
  counts = steps(at.reshape(N * splits, -1), BLOCK).reshape(N, splits)
  scratch = {
    'qc': memory(2, HEADS, half),
    # Stage, tokens, columns.
    'kc': memory(2, 2, 2, PART, half),
    'ps': memory(2, HEADS, PART),
    'stat': plgpu.SMEM((2, HEADS), jnp.float32),
    'q_here': plgpu.Barrier(num_arrivals=3 if rope else 2),
    'k_here': plgpu.Barrier(num_arrivals=2),
    'max_here': plgpu.Barrier(num_arrivals=2),
    'p_here': plgpu.Barrier(num_arrivals=2),
  }
  if rope:
    scratch |= {'qr': memory(HEADS, ROPE), 'kr': memory(2, 2, PART, ROPE)}
  near = ats[0].shape[1] // BLOCK if len(lists) > 1 else None
  out, lse = compat.kernel(
    functools.partial(_body, scale=scale * LOG2E, near=near),
    (
      jax.ShapeDtypeStruct((N, splits, H, C), q_c.dtype),
      jax.ShapeDtypeStruct((N, splits, H), jnp.float32),
    ),
    grid={'query': N, 'tile': H // HEADS, 'split': splits},
    threads=2,
    across_warps=False,
    scratch=scratch,
  )(q_c, q_r, lists, at, counts, sinks)
  if splits == 1:
    return out[:, 0], lse[:, 0]
  return latent_blocks.merge(out, lse)


def _pick_splits(tiles: int, blocks: int) -> int:
  """Returns splits of a query's choices: fill the device once.

  Args:
    tiles: thread blocks without splits.
    blocks: of choices, of which a split has two or more.
  """
  return max(1, min(compat.num_sms() // tiles, blocks // 2))


def _body(
  q_c: jax.Ref, q_r: jax.Ref | None, lists: tuple, at: jax.Ref,
  steps: jax.Ref, sinks: jax.Ref | None, out: jax.Ref, lse: jax.Ref,
  qc: jax.Ref, kc: jax.Ref, ps: jax.Ref, stat: jax.Ref, q_here: jax.Ref,
  k_here: jax.Ref, max_here: jax.Ref, p_here: jax.Ref,
  qr: jax.Ref | None = None, kr: jax.Ref | None = None, *, scale: float,
  near: int | None,
) -> None:  # fmt: skip
  """Computes 64 heads of one query over one split of its latents.

  Of two lists the first `near` blocks are in the first one.
  """
  n, tile, split, w = (
    lax.axis_index(a) for a in ('query', 'tile', 'split', 'wg')
  )
  heads, half = pl.ds(tile * HEADS, HEADS), qc.shape[-1]
  columns = pl.ds(w * half, half)
  first = split * (at.shape[1] // BLOCK // steps.shape[1])
  last = first + steps[n, split]

  def chosen(block: jax.Array, part: int | jax.Array) -> tuple:
    return n, pl.ds(block * BLOCK + part * PART, PART)

  def start(latents: Latents, block: jax.Array) -> None:
    stage = lax.rem(block, 2)
    for part in range(2):
      rows = at.at[chosen(block, part)]
      gather.start(latents.c.at[:, columns], rows, kc.at[stage, part, w])
    if kr is not None:
      gather.start(latents.k_r, at.at[chosen(block, w)], kr.at[stage, w])

  def fetch(block: jax.Array) -> None:
    @pl.when(block < last)
    def _():
      if near is None:
        start(lists[0], block)
      else:
        pl.when(block < near)(lambda: start(lists[0], block))
        pl.when(block >= near)(lambda: start(lists[1], block))

    gather.commit()

  # Load: the queries stay, two blocks of latents are on their way.
  latent_blocks.load_queries(q_c, q_r, (n, heads), qc, qr, q_here)
  lax.fori_loop(first, first + 2, lambda block, _: fetch(block), None)
  sink = None
  if sinks is not None:
    # One split counts it.
    sink = lax.cond(
      split == 0,
      lambda: compat.load(sinks, heads, BY_ROW, optimized=False),
      lambda: compat.full((HEADS,), EMPTY, BY_ROW),
    )
  plgpu.barrier_wait(q_here)

  def step(
    block: jax.Array, running: latent_blocks.Running
  ) -> latent_blocks.Running:
    stage = lax.rem(block, 2)
    # Wait: this warpgroup's rows are here, then both have theirs.
    gather.wait(1)
    plgpu.commit_smem()
    meet(k_here)
    # Scores: this warpgroup's 32 tokens, all columns.
    latents = lambda i: kc.at[stage, w, i]
    turned = None if kr is None else kr.at[stage, w]
    s = latent_blocks.scores(qc, qr, latents, turned, scale, PART)
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

  running = lax.fori_loop(first, last, step, latent_blocks.start(half, sink))
  latent_blocks.finish(
    running,
    qc,
    stat,
    (max_here, p_here),
    out.at[n, split, heads, columns],
    lse.at[n, split, heads],
  )
