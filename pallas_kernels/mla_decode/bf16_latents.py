"""Absorbed latent attention over bfloat16 latents on Hopper.

A thread block holds 64 query rows (heads and new tokens of one request) and
walks 64-token blocks. Warpgroup w scores every second block, and sums columns
[256 w, 256 w + 256) over all of them. The maximum passes from one warpgroup to
the other with the probabilities of a block, so that they stay half a step
apart: while one exponentiates, the other multiplies (FlashMLA's seesaw).

Two warpgroups get 255 registers a thread without setmaxnreg, which some
compilers ignore, so there is no warpgroup for loading: each refills the half
of a block that it was the last to read. Beside the queries two blocks fit, so
scores begin with what was free first. Legend: as in mla_decode; N query rows,
T H to a multiple of 64.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, latent_blocks
from pallas_kernels.latent_blocks import (
  BY_ROW,
  HALF,
  LOG2E,
  ROPE,
  ROWS,
  Running,
)
from pallas_kernels.mla_decode import request_parts
from pallas_kernels.mla_decode.request_parts import (
  BLOCK,
  RequestPart,
  Requests,
  RequestSplits,
)
from pallas_kernels.warpgroups import wide


def check_dtypes(*dtypes: jnp.dtype) -> None:
  """Raises NotImplementedError unless all dtypes are bfloat16."""
  if any(dtype != jnp.bfloat16 for dtype in dtypes):
    raise NotImplementedError(
      f'dtype {"/".join(dict.fromkeys(map(str, dtypes)))}, not bfloat16'
    )


def partial_sums(
  queries: tuple[jax.Array, jax.Array],
  pages: tuple[jax.Array, jax.Array],
  requests: Requests,
  cut: RequestSplits,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes `request_parts.run` over pages [blocks 64 C], [blocks 64 R]."""
  tile = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  per_row = plgpu.SMEM((2, ROWS), jnp.float32)
  scratch = {
    'qc': tile(2, ROWS, HALF),
    'qr': tile(ROWS, ROPE),
    'kc': tile(2, 2, BLOCK, HALF),  # stage, half of the columns
    'kr': tile(2, BLOCK, ROPE),
    'ps': tile(ROWS, BLOCK),  # of one block at a time, by turns
    'tops': per_row,
    'sums': per_row,
    'q_here': plgpu.Barrier(num_arrivals=3),
    'k_here': plgpu.Barrier(num_barriers=4),  # stage and half
    'r_here': plgpu.Barrier(num_barriers=2),
    'p_here': plgpu.Barrier(num_barriers=2),
    'ended': plgpu.Barrier(num_arrivals=2),
  }
  body = functools.partial(_body, cut=cut, scale=scale * LOG2E)
  return request_parts.run(body, queries, pages, requests, cut, scratch)


class _Blocks(NamedTuple):
  """Loads this warpgroup's share of blocks of tokens into shared memory.

  Attributes:
    part: what the thread block computes.
    pages: of latents and rotary keys, in global memory.
    kc, kr: [2 2 64 h] by stage and half, and [2 64 R].
    k_here, r_here: barriers of what has arrived.
  """

  part: RequestPart
  pages: tuple[jax.Ref, jax.Ref]
  kc: jax.Ref
  kr: jax.Ref
  k_here: jax.Ref
  r_here: jax.Ref

  def load_half(self, place: jax.Array, stage: jax.Array) -> None:
    """Starts the copy of columns [256 w, 256 w + 256)."""
    w = lax.axis_index('wg')
    source = self.pages[0].at[place, :, pl.ds(w * HALF, HALF)]
    here = self.k_here.at[2 * stage + w]
    plgpu.copy_gmem_to_smem(source, self.kc.at[stage, w], here)

  def load_rope(self, place: jax.Array) -> None:
    """Starts the copy of rotary keys, of a block that it scores."""
    w = lax.axis_index('wg')
    source, here = self.pages[1].at[place], self.r_here.at[w]
    plgpu.copy_gmem_to_smem(source, self.kr.at[w], here)

  def begin(self) -> None:
    """Starts the copies of the first two blocks."""
    first, last, w = self.part.first, self.part.last, lax.axis_index('wg')

    def half(stage: jax.Array, _) -> tuple:
      self.load_half(self.part.place(first + stage), stage)
      return ()

    lax.fori_loop(0, jnp.minimum(last - first, 2), half, ())
    pl.when(first + w < last)(
      lambda: self.load_rope(self.part.place(first + w))
    )

  def scores(self, qc: jax.Ref, qr: jax.Ref) -> jax.Array:
    """Returns the products [64 64] of the queries and a block, as it comes."""
    w = lax.axis_index('wg')

    def products(ref: jax.Ref) -> jax.Array:
      plgpu.barrier_wait(self.r_here.at[w])
      compat.wgmma(ref, qr, compat.transposed(self.kr.at[w]))

      # Its own half was free first. A loop: unrolled, descriptors spill.
      def half(i: jax.Array, _) -> tuple:
        j = lax.rem(w + i, 2)
        plgpu.barrier_wait(self.k_here.at[2 * w + j])
        compat.wgmma(ref, qc.at[j], compat.transposed(self.kc.at[w, j]))
        return ()

      lax.fori_loop(0, 2, half, ())
      return ref[...]

    return pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))

  def clear(self, stage: jax.Array, block: jax.Array) -> None:
    """Zeros latents behind the length: any bits lie there, 0 * nan is nan."""
    left = self.part.length - block * BLOCK
    latents = self.kc.at[stage, lax.axis_index('wg')]
    pl.when(left < BLOCK)(lambda: latent_blocks.clear_from(latents, left))


def _body(
  queries: tuple[jax.Ref, jax.Ref], pages: tuple[jax.Ref, jax.Ref],
  requests: Requests, out: jax.Ref, lse: jax.Ref, qc: jax.Ref, qr: jax.Ref,
  kc: jax.Ref, kr: jax.Ref, ps: jax.Ref, tops: jax.Ref, sums: jax.Ref,
  q_here: jax.Ref, k_here: jax.Ref, r_here: jax.Ref, p_here: jax.Ref,
  ended: jax.Ref, *, cut: RequestSplits, scale: float,
) -> None:  # fmt: skip
  """Computes 64 query rows over one split of a request's tokens."""
  w = lax.axis_index('wg')
  part = request_parts.own_part(requests, cut)
  first, last = part.first, part.last
  blocks = _Blocks(part, pages, kc, kr, k_here, r_here)
  # Load: the queries stay, this warpgroup's half of two blocks is on its way.
  latent_blocks.load_queries(*queries, (part.b, part.rows), qc, qr, q_here)
  blocks.begin()
  plgpu.barrier_wait(q_here)

  def weigh_other(running: Running, ends: bool = False) -> Running:
    """Adds what the other warpgroup scored, in this one's columns."""
    other = 1 - w
    plgpu.barrier_wait(k_here.at[2 * other + w])
    plgpu.barrier_wait(p_here.at[other])
    # Only a request's last block is cleared: more would spill in the loop.
    if ends:
      blocks.clear(other, last - 1)
    top = compat.load(tops, other, BY_ROW)
    shrink = jnp.exp2(running.top - top)
    acc = running.acc * wide(shrink, running.acc.shape)
    acc = latent_blocks.add(acc, (ps, kc.at[other, w]))
    plgpu.commit_smem()  # all warps have read what is overwritten next
    return Running(acc, top, running.total * shrink)

  def step(i: jax.Array, running: Running) -> Running:
    block = first + 2 * i + w
    # Of the next blocks, early: the table is far away.
    nearer, farther = part.place(block + 1), part.place(block + 2)
    # Scores: of every second block, all columns.
    s = blocks.scores(qc, qr)
    pl.when(block + 2 < last)(lambda: blocks.load_rope(farther))
    s = part.masked(s, block * BLOCK)
    # Values of the block before: the maximum comes with its probabilities.
    earlier = block > first
    running = lax.cond(earlier, weigh_other, lambda r: r, running)
    pl.when(earlier & (block + 1 < last))(
      lambda: blocks.load_half(nearer, 1 - w)
    )
    # Softmax: online, in base 2; the other warpgroup waits for it.
    top = jnp.maximum(running.top, s.max(axis=1) * scale)
    p = jnp.exp2(s * scale - wide(top, s.shape))
    shrink = jnp.exp2(running.top - top)
    total = running.total * shrink + p.sum(axis=1)
    p = p.astype(jnp.bfloat16)
    ps[...] = p
    tops[w] = top
    plgpu.commit_smem()
    plgpu.barrier_arrive(p_here.at[w])
    # Values of this block: from registers, the other one reads the copy.
    blocks.clear(w, block)
    acc = running.acc * wide(shrink, running.acc.shape)
    acc = compat.add_product(acc, p, kc.at[w, w])
    pl.when(block + 2 < last)(lambda: blocks.load_half(farther, w))
    return Running(acc, top, total)

  own = lax.div(jnp.maximum(last - first - w, 0) + 1, 2)
  running = lax.fori_loop(0, own, step, latent_blocks.start())
  # The other warpgroup's last block, where it comes behind this one's.
  behind = (last > first) & (lax.rem(last - first + w, 2) == 0)
  weigh_last = functools.partial(weigh_other, ends=True)
  running = lax.cond(behind, weigh_last, lambda r: r, running)
  at = part.b, part.split, part.rows
  latent_blocks.finish(
    running,
    qc,
    sums,
    (ended, ended),
    out.at[(*at, pl.ds(w * HALF, HALF))],
    lse.at[at],
  )
