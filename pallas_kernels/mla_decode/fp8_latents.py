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
from pallas_kernels.latent_blocks import (
  BY_ROW,
  HALF,
  LATENT,
  LOG2E,
  ROPE,
  ROWS,
)
from pallas_kernels.quantize.reference import FP8

BLOCK, PART, GROUP = 64, 32, 128
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four numbers a thread, not two
_RAW = (plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(128))


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
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  scales: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  order: jax.Array,
  row_new: jax.Array,
  *,
  scale: float,
  splits: int,
  new: int,
  page: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention of each split alone, to be merged by its lse.

  Args:
    q_c, q_r: [B N C] and [B N R] queries, bfloat16.
    c, scales, k_r: [blocks 64 C] float8, [blocks 64 C/128] float32 and
      [blocks 64 R] bfloat16, the cache of all requests.
    table, lengths: as in mla_decode.
    order: [B] int32, the requests in the order in which they start.
    row_new: [N] int32, the new token that each row belongs to.
    scale: of the scores.
    splits: parts of a request's tokens.
    new: T.
    page: G.

  Returns:
    out [B splits N C] bfloat16 and lse [B splits N] float32, base 2.
  """
  B, rows, _ = q_c.shape
  memory = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=gather.TILE
  )
  return compat.kernel(
    functools.partial(
      _body,
      scale=scale * LOG2E,
      splits=splits,
      new=new,
      per_page=page // BLOCK,
    ),
    (
      jax.ShapeDtypeStruct((B, splits, rows, LATENT), jnp.bfloat16),
      jax.ShapeDtypeStruct((B, splits, rows), jnp.float32),
    ),
    grid={'request': B, 'tile': rows // ROWS, 'split': splits},
    threads=2,
    across_warps=False,
    scratch={
      'qc': memory(2, ROWS, HALF),
      'qr': memory(ROWS, ROPE),
      'raw': plgpu.SMEM((2, 2, BLOCK, HALF), FP8, transforms=_RAW),
      'kc': memory(2, BLOCK, HALF),
      'kr': memory(2, 2, PART, ROPE),  # stage, tokens
      'ps': memory(2, ROWS, PART),
      'stat': plgpu.SMEM((2, ROWS), jnp.float32),
      'q_here': plgpu.Barrier(num_arrivals=3),
      # Stage and warpgroup: each loads and awaits its own.
      'raw_here': plgpu.Barrier(num_barriers=4),
      'kr_here': plgpu.Barrier(num_barriers=4),
      'met': plgpu.Barrier(num_arrivals=2),
    },
  )(q_c, q_r, c, scales, k_r, table, lengths, order, row_new)


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
    x = x * latent_blocks.wide(factor, x.shape)
    kc[group] = x.astype(jnp.bfloat16)


def _body(
  q_c: jax.Ref, q_r: jax.Ref, c: jax.Ref, scales: jax.Ref, k_r: jax.Ref,
  table: jax.Ref, lengths: jax.Ref, order: jax.Ref, row_new: jax.Ref,
  out: jax.Ref, lse: jax.Ref, qc: jax.Ref, qr: jax.Ref, raw: jax.Ref,
  kc: jax.Ref, kr: jax.Ref, ps: jax.Ref, stat: jax.Ref, q_here: jax.Ref,
  raw_here: jax.Ref, kr_here: jax.Ref, met: jax.Ref, *, scale: float,
  splits: int, new: int, per_page: int,
) -> None:  # fmt: skip
  """Computes 64 query rows over one split of a request's tokens."""
  nth, tile, split, w = (
    lax.axis_index(a) for a in ('request', 'tile', 'split', 'wg')
  )
  b = order[nth]
  length, rows = lengths[b], pl.ds(tile * ROWS, ROWS)
  blocks = lax.div(length + (BLOCK - 1), BLOCK)
  per_split = lax.div(blocks + (splits - 1), splits)
  first = split * per_split
  count = jnp.minimum(first + per_split, blocks) - first
  columns = pl.ds(w * HALF, HALF)

  def place(i: jax.Array) -> jax.Array:
    page = table[b, lax.div(first + i, per_page)]
    return page * per_page + lax.rem(first + i, per_page)

  def barrier(i: jax.Array) -> jax.Array:
    return lax.rem(i, 2) * 2 + w

  def load_raw(i: jax.Array) -> None:
    stage = lax.rem(i, 2)
    plgpu.copy_gmem_to_smem(
      c.at[place(i), :, columns], raw.at[stage, w], raw_here.at[barrier(i)]
    )

  def load_rope(i: jax.Array) -> None:
    tokens, stage = pl.ds(w * PART, PART), lax.rem(i, 2)
    plgpu.copy_gmem_to_smem(
      k_r.at[place(i), tokens], kr.at[stage, w], kr_here.at[barrier(i)]
    )

  def begin(i: jax.Array, _) -> tuple:
    load_raw(i)
    load_rope(i)
    return ()

  # Load: the queries stay, two blocks of tokens are on their way.
  latent_blocks.load_queries(q_c, q_r, (b, rows), qc, qr, q_here)
  lax.fori_loop(0, jnp.minimum(count, 2), begin, ())
  plgpu.barrier_wait(q_here)
  # New token t attends to all but the T - 1 - t newest tokens.
  seen = compat.load(row_new, rows, BY_ROW, optimized=False)
  seen = seen + (length - (new - 1))

  def step(i: jax.Array, carry: tuple) -> tuple:
    running, factors = carry
    # Dequantize: this warpgroup's columns; both are read by either's scores.
    plgpu.barrier_wait(raw_here.at[barrier(i)])
    _dequantize(raw.at[lax.rem(i, 2), w], kc.at[w], factors)
    plgpu.commit_smem()
    # Behind the length, in a last block alone.
    left = length - (first + i) * BLOCK
    clear = lambda: latent_blocks.clear_from(kc.at[w], left)
    pl.when(left < BLOCK)(clear)
    latent_blocks.meet(met)
    pl.when(i + 2 < count)(lambda: load_raw(i + 2))
    factors = _load_scales(scales, place(jnp.minimum(i + 1, count - 1)))
    # Scores: this warpgroup's 32 tokens, all columns.
    plgpu.barrier_wait(kr_here.at[barrier(i)])
    tokens = pl.ds(pl.multiple_of(w * PART, PART), PART)
    rope = kr.at[lax.rem(i, 2), w]
    s = latent_blocks.scores(qc, qr, lambda j: kc.at[j, tokens], rope, scale)
    key = (first + i) * BLOCK + w * PART
    mask = lambda s: latent_blocks.mask_from(s, seen - key)
    s = lax.cond(key + PART > length - (new - 1), mask, lambda s: s, s)
    # Softmax: over all 64 tokens, so the maxima cross over.
    own = latent_blocks.publish_max(s, stat, met)
    pl.when(i + 2 < count)(lambda: load_rope(i + 2))
    shrink, running = latent_blocks.softmax_step(s, own, running, stat, ps, met)
    # Values: all 64 tokens, this warpgroup's columns.
    latents = lambda part: kc.at[w, pl.ds(part * PART, PART)]
    return latent_blocks.weigh(running, shrink, ps, latents), factors

  # A split without tokens has no scales to load.
  none = compat.full((BLOCK,), 0.0, _BYTES.reduce(1))
  factors = lax.fori_loop(
    0,
    jnp.minimum(count, 1),
    lambda i, _: _load_scales(scales, place(i)),
    (none, none),
  )
  start = latent_blocks.start(), factors
  running, _ = lax.fori_loop(0, count, step, start)
  latent_blocks.finish(
    running,
    qc,
    stat,
    (met, met),
    out.at[b, split, rows, columns],
    lse.at[b, split, rows],
  )
