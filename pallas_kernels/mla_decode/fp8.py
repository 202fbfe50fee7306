"""Absorbed latent attention over float8 latents on Hopper.

As in gpu.py a thread block holds 64 query rows, and two warpgroups share scores
by tokens and the output by columns. A block of 64 tokens arrives as float8 by
TMA, two ahead; warpgroup w multiplies columns [256 w, 256 w + 256) by their
scales and writes them as bfloat16 to where wgmma reads them. There is room for
one such block beside the queries, so tensor cores wait while it is written.
Splits are merged as in the bfloat16 kernel.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.quantize.reference import FP8

ROWS, BLOCK, PART, LATENT, HALF, ROPE, GROUP = 64, 64, 32, 512, 256, 64, 128
EMPTY = -1e30  # running maximum of a row that has seen no key yet
_TILE = plgpu.Layout.WGMMA
_BY_ROW = _TILE.reduce(1)
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four numbers a thread, not two
_RAW = (plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(128))


def supported(q_c, c, scales, k_r):
  if c.dtype != FP8 or scales.dtype != jnp.float32:
    raise NotImplementedError(
      f'latents {c.dtype} with scales {scales.dtype}, not float8_e4m3fn and '
      'float32'
    )
  if q_c.dtype != jnp.bfloat16 or k_r.dtype != jnp.bfloat16:
    raise NotImplementedError(f'dtype {q_c.dtype}/{k_r.dtype}, not bfloat16')
  if (q_c.shape[-1], k_r.shape[-1]) != (LATENT, ROPE):
    raise NotImplementedError(
      f'latent {q_c.shape[-1]} and rope {k_r.shape[-1]}, not 512 and 64'
    )
  if c.shape[1] % BLOCK:
    raise NotImplementedError(f'{c.shape[1]} tokens a page, not 64 * n')


def partial_sums(
  q_c, q_r, c, scales, k_r, table, lengths, row_new, *, scale, splits, new
):
  """Attention of each split alone: out [B splits rows C], lse base 2."""
  B, rows, _ = q_c.shape
  page = c.shape[1]
  in_blocks = lambda a: a.reshape(-1, BLOCK, a.shape[-1])
  memory = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=gather.TILE
  )
  return compat.kernel(
    functools.partial(
      _body,
      scale=scale * math.log2(math.e),
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
  )(
    q_c, q_r, in_blocks(c), in_blocks(scales), in_blocks(k_r), table, lengths,
    row_new,
  )  # fmt: skip


def _wide(values, shape, axis=0):
  return lax.broadcast_in_dim(values, shape, [axis])


def _body(
  q_c, q_r, c, scales, k_r, table, lengths, row_new, out, lse,
  qc, qr, raw, kc, kr, ps, stat, q_here, raw_here, kr_here, met,
  *, scale, splits, new, per_page,
):  # fmt: skip
  b, tile, split, w = (
    lax.axis_index(a) for a in ('request', 'tile', 'split', 'wg')
  )
  length, rows = lengths[b], pl.ds(tile * ROWS, ROWS)
  blocks = lax.div(length + (BLOCK - 1), BLOCK)
  per_split = lax.div(blocks + (splits - 1), splits)
  first = split * per_split
  count = jnp.minimum(first + per_split, blocks) - first
  columns = pl.ds(w * HALF, HALF)

  def meet():
    """Both warpgroups get here before either goes on."""
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)

  def place(i):
    """Where block i of this split lies in the cache of all."""
    page = table[b, lax.div(first + i, per_page)]
    return page * per_page + lax.rem(first + i, per_page)

  def own(i):
    return lax.rem(i, 2) * 2 + w

  def load_raw(i):
    stage = lax.rem(i, 2)
    plgpu.copy_gmem_to_smem(
      c.at[place(i), :, columns], raw.at[stage, w], raw_here.at[own(i)]
    )

  def load_rope(i):
    tokens, stage = pl.ds(w * PART, PART), lax.rem(i, 2)
    plgpu.copy_gmem_to_smem(
      k_r.at[place(i), tokens], kr.at[stage, w], kr_here.at[own(i)]
    )

  def load_scales(i):
    return tuple(
      compat.load(
        scales,
        (place(i), slice(None), w * (HALF // GROUP) + j),
        _BYTES.reduce(1),
        optimized=False,
      )
      for j in range(HALF // GROUP)
    )

  @pl.when(w == 0)
  def _():
    for i in range(2):
      plgpu.copy_gmem_to_smem(
        q_c.at[b, rows, pl.ds(i * HALF, HALF)], qc.at[i], q_here
      )
    plgpu.copy_gmem_to_smem(q_r.at[b, rows], qr, q_here)

  def begin(i, _):
    load_raw(i)
    load_rope(i)
    return ()

  lax.fori_loop(0, jnp.minimum(count, 2), begin, ())
  plgpu.barrier_wait(q_here)
  seen = compat.load(row_new, rows, _BY_ROW, optimized=False)
  seen = seen + (length - (new - 1))

  def widen(i, factors):
    """This warpgroup's columns of the block times their scales."""
    source = raw.at[lax.rem(i, 2), w]
    for j, factor in enumerate(factors):
      group = slice(None), pl.ds(j * GROUP, GROUP)
      x = compat.load(source, group, _BYTES)
      x = x.astype(jnp.float16).astype(jnp.float32)
      x = x * _wide(factor, x.shape)
      # What lies behind the length is arbitrary, and 0 * nan is nan.
      at = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_BYTES)
      x = jnp.where(at < length - (first + i) * BLOCK, x, jnp.zeros_like(x))
      kc.at[w][group] = x.astype(jnp.bfloat16)

  def scores(i):
    tokens = pl.ds(pl.multiple_of(w * PART, PART), PART)

    def products(ref):
      # A loop, not two calls: unrolled, the descriptors spill (measured).
      def half(j, _):
        compat.wgmma(ref, qc.at[j], compat.transposed(kc.at[j, tokens]))
        return ()

      lax.fori_loop(0, 2, half, ())
      compat.wgmma(ref, qr, compat.transposed(kr.at[lax.rem(i, 2), w]))
      return ref[...]

    s = pl.run_scoped(products, plgpu.ACC((ROWS, PART), jnp.float32)) * scale
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=_TILE)
    left = seen - ((first + i) * BLOCK + w * PART)
    return jnp.where(key < _wide(left, s.shape), s, -jnp.inf)

  def step(i, carry):
    acc, top, total, *factors = carry
    plgpu.barrier_wait(raw_here.at[own(i)])
    widen(i, factors)
    plgpu.commit_smem()
    meet()
    pl.when(i + 2 < count)(lambda: load_raw(i + 2))
    factors = load_scales(jnp.minimum(i + 1, count - 1))
    plgpu.barrier_wait(kr_here.at[own(i)])
    s = scores(i)
    highest = s.max(axis=1)
    stat[w] = highest
    meet()
    pl.when(i + 2 < count)(lambda: load_rope(i + 2))
    other = compat.load(stat, 1 - w, _BY_ROW)
    new_top = jnp.maximum(top, jnp.maximum(highest, other))
    p = jnp.exp2(s - _wide(new_top, s.shape))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    meet()
    acc = acc * _wide(shrink, acc.shape)

    def weigh(ref):
      for part in range(2):
        tokens = pl.ds(part * PART, PART)
        compat.wgmma(ref, ps.at[part], kc.at[w, tokens])
      plgpu.wgmma_wait(0)

    return compat.accumulate(acc, weigh), new_top, total, *factors

  # None for a split without tokens.
  none = compat.full((BLOCK,), 0.0, _BYTES.reduce(1))
  factors = lax.fori_loop(
    0, jnp.minimum(count, 1), lambda i, _: load_scales(i), (none, none)
  )
  acc, top, total, *_ = lax.fori_loop(
    0,
    count,
    step,
    (
      compat.full((ROWS, HALF), 0.0, _TILE),
      compat.full((ROWS,), EMPTY, _BY_ROW),
      compat.full((ROWS,), 0.0, _BY_ROW),
      *factors,
    ),
  )
  stat[w] = total
  meet()
  total = total + compat.load(stat, 1 - w, _BY_ROW)
  safe = jnp.where(total > 0, total, 1.0)
  qc[w] = (acc / _wide(safe, acc.shape)).astype(jnp.bfloat16)
  meet()  # both have read the sums

  @pl.when(w == 0)
  def _():
    stat[0] = jnp.where(total > 0, top + jnp.log2(safe), EMPTY)

  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(qc.at[w], out.at[b, split, rows, columns])
  pl.when(w == 0)(
    lambda: plgpu.copy_smem_to_gmem(stat.at[0], lse.at[b, split, rows])
  )
  plgpu.wait_smem_to_gmem(0)
