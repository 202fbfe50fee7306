"""Absorbed latent attention over float8 latents on Hopper.

As in gpu.py a thread block holds 64 query rows, and two warpgroups share scores
by tokens and the output by columns. A block of 64 tokens arrives as float8 by
TMA, two ahead; warpgroup w multiplies columns [256 w, 256 w + 256) by their
scales and writes them as bfloat16 to where wgmma reads them. There is room for
one such block beside the queries, so tensor cores wait while it is written.
Splits are merged as in the bfloat16 kernel. Legend: as in gpu.py.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather, latent_blocks
from pallas_kernels.latent_blocks import HALF, LOG2E, ROPE, ROWS
from pallas_kernels.mla_decode import request_parts
from pallas_kernels.mla_decode.request_parts import (
  BLOCK,
  Requests,
  RequestSplits,
)
from pallas_kernels.quantize.reference import FP8
from pallas_kernels.warpgroups import meet, wide

PART, GROUP = 32, 128
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four numbers a thread, not two


def check_dtypes(
  queries: jnp.dtype, c: jax.Array, scales: jax.Array, k_r: jax.Array
) -> None:
  """Raises NotImplementedError for dtypes that the kernel can't take."""
  if c.dtype != FP8 or scales.dtype != jnp.float32:
    raise NotImplementedError(
      f'latents {c.dtype} with scales {scales.dtype}, not float8_e4m3fn and '
      'float32'
    )
  if queries != jnp.bfloat16 or k_r.dtype != jnp.bfloat16:
    raise NotImplementedError(f'dtype {queries}/{k_r.dtype}, not bfloat16')


def partial_sums(
  queries: tuple[jax.Array, jax.Array],
  pages: tuple[jax.Array, jax.Array, jax.Array],
  requests: Requests,
  cut: RequestSplits,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes `request_parts.run` over pages in float8.

  Args:
    queries: see there.
    pages: [blocks 64 C] float8, their scales [blocks 64 C/128] float32, and
      [blocks 64 R] bfloat16.
    requests, cut: see there.
    scale: of the scores.
  """
  memory = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=gather.TILE
  )
  scratch = {
    'qc': memory(2, ROWS, HALF),
    'qr': memory(ROWS, ROPE),
    'raw': plgpu.SMEM((2, 2, BLOCK, HALF), FP8, transforms=compat.TILED_8BIT),
    'kc': memory(2, BLOCK, HALF),
    'kr': memory(2, 2, PART, ROPE),  # stage, tokens
    'ps': memory(2, ROWS, PART),
    'stat': plgpu.SMEM((2, ROWS), jnp.float32),
    'q_here': plgpu.Barrier(num_arrivals=3),
    # Stage and warpgroup: each loads and awaits its own.
    'raw_here': plgpu.Barrier(num_barriers=4),
    'kr_here': plgpu.Barrier(num_barriers=4),
    'met': plgpu.Barrier(num_arrivals=2),
  }
  body = functools.partial(_body, cut=cut, scale=scale * LOG2E)
  return request_parts.run(body, queries, pages, requests, cut, scratch)


def _load_scales(scales: jax.Ref, block: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the scales [64] of each group of this warpgroup's columns."""
  w = lax.axis_index('wg')
  return tuple(
    compat.load(
      scales,
      (block, slice(None), w * (HALF // GROUP) + j),
      _BYTES.reduce(1),
      optimized=False,
    )
    for j in range(HALF // GROUP)
  )


def _dequantize(
  raw: jax.Ref, kc: jax.Ref, factors: tuple[jax.Array, ...]
) -> None:
  """Writes raw [64 256] float8 times its scales to kc [64 256] bfloat16."""
  for j, factor in enumerate(factors):
    group = slice(None), pl.ds(j * GROUP, GROUP)
    x = compat.load(raw, group, _BYTES)
    # float16 holds every float8 number, and converts in one instruction.
    x = x.astype(jnp.float16).astype(jnp.float32)
    x = x * wide(factor, x.shape)
    kc[group] = x.astype(jnp.bfloat16)


def _body(
  queries: tuple[jax.Ref, jax.Ref], pages: tuple[jax.Ref, jax.Ref, jax.Ref],
  requests: Requests, out: jax.Ref, lse: jax.Ref, qc: jax.Ref, qr: jax.Ref,
  raw: jax.Ref, kc: jax.Ref, kr: jax.Ref, ps: jax.Ref, stat: jax.Ref,
  q_here: jax.Ref, raw_here: jax.Ref, kr_here: jax.Ref, met: jax.Ref, *,
  cut: RequestSplits, scale: float,
) -> None:  # fmt: skip
  """Computes 64 query rows over one split of a request's tokens."""
  w, (c, scales, k_r) = lax.axis_index('wg'), pages
  part = request_parts.own_part(requests, cut)
  first, last, columns = part.first, part.last, pl.ds(w * HALF, HALF)
  # Stages and barriers take turns by the number of the block.
  stage = lambda block: lax.rem(block, 2)
  barrier = lambda block: stage(block) * 2 + w

  def load_raw(block: jax.Array) -> None:
    source = c.at[part.place(block), :, columns]
    here = raw_here.at[barrier(block)]
    plgpu.copy_gmem_to_smem(source, raw.at[stage(block), w], here)

  def load_rope(block: jax.Array) -> None:
    source = k_r.at[part.place(block), pl.ds(w * PART, PART)]
    here = kr_here.at[barrier(block)]
    plgpu.copy_gmem_to_smem(source, kr.at[stage(block), w], here)

  def begin(block: jax.Array, _) -> tuple:
    load_raw(block)
    load_rope(block)
    return ()

  # Load: the queries stay, two blocks of tokens are on their way.
  latent_blocks.load_queries(*queries, (part.b, part.rows), qc, qr, q_here)
  lax.fori_loop(first, jnp.minimum(first + 2, last), begin, ())
  plgpu.barrier_wait(q_here)

  def step(block: jax.Array, carry: tuple) -> tuple:
    running, factors = carry
    # Dequantize: this warpgroup's columns; both are read by either's scores.
    plgpu.barrier_wait(raw_here.at[barrier(block)])
    _dequantize(raw.at[stage(block), w], kc.at[w], factors)
    plgpu.commit_smem()
    # Behind the length, in a last block alone.
    left = part.length - block * BLOCK
    clear = lambda: latent_blocks.clear_from(kc.at[w], left)
    pl.when(left < BLOCK)(clear)
    meet(met)
    pl.when(block + 2 < last)(lambda: load_raw(block + 2))
    factors = _load_scales(scales, part.place(block + 1))
    # Scores: this warpgroup's 32 tokens, all columns.
    plgpu.barrier_wait(kr_here.at[barrier(block)])
    tokens = pl.ds(pl.multiple_of(w * PART, PART), PART)
    rope = kr.at[stage(block), w]
    s = latent_blocks.scores(qc, qr, lambda j: kc.at[j, tokens], rope, scale)
    s = part.masked(s, block * BLOCK + w * PART)
    # Softmax: over all 64 tokens, so the maxima cross over.
    own = latent_blocks.publish_max(s, stat, met)
    pl.when(block + 2 < last)(lambda: load_rope(block + 2))
    shrink, running = latent_blocks.softmax_step(s, own, running, stat, ps, met)
    # Values: all 64 tokens, this warpgroup's columns.
    latents = lambda i: kc.at[w, pl.ds(i * PART, PART)]
    return latent_blocks.weigh(running, shrink, ps, latents), factors

  # A split without tokens has no scales to load.
  none = compat.full((BLOCK,), 0.0, _BYTES.reduce(1))
  factors = lax.fori_loop(
    first,
    jnp.minimum(first + 1, last),
    lambda block, _: _load_scales(scales, part.place(block)),
    (none, none),
  )
  start = latent_blocks.start(), factors
  running, _ = lax.fori_loop(first, last, step, start)
  at = part.b, part.split, part.rows
  latent_blocks.finish(
    running, qc, stat, (met, met), out.at[(*at, columns)], lse.at[at]
  )
