"""Absorbed latent attention on Hopper: two warpgroups, each half the output.

A thread block holds 64 query rows (heads and new tokens of one request) and
walks pairs of 64-token blocks. Warpgroup w scores block w of the pair, the two
exchange row maxima and probabilities through shared memory, and then w sums
columns [256 w, 256 w + 256) over both blocks: a 64 x 512 float32 output fits
the registers of no single warpgroup (the split is FlashMLA's idea).

Two warpgroups get 255 registers a thread without setmaxnreg, which some
compilers ignore, so there is no warpgroup for loading: each refills what it
was the last to read. Probabilities overwrite the rotary tile they came from.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.mla_decode import fp8

ROWS, BLOCK, LATENT, HALF, ROPE = 64, 64, 512, 256, 64
_EMPTY = -1e30  # running maximum of a row that has seen no key yet


def mla_decode(q_c, q_r, c, k_r, table, lengths, scale, scales, splits):
  if scales is None:
    _supported(q_c, k_r, c)
  else:
    fp8.supported(q_c, c, scales, k_r)
  B, T, H, _ = q_c.shape
  rows = -(-T * H // ROWS) * ROWS
  pad = lambda q: jnp.pad(
    q.reshape(B, T * H, -1), ((0, 0), (0, rows - T * H), (0, 0))
  )
  row_new = jnp.minimum(jnp.arange(rows, dtype=jnp.int32) // H, T - 1)
  if splits is None:
    longest = table.shape[1] * c.shape[1]
    splits = _pick_splits(B * rows // ROWS, longest, compat.num_sms())
  queries, rest = (pad(q_c), pad(q_r)), (table, lengths, row_new)
  how = {'scale': scale, 'splits': splits, 'new': T}
  if scales is None:
    pages = _in_blocks(c, k_r)
    out, lse = _partial(*queries, *pages, *rest, **how, page=c.shape[1])
  else:
    out, lse = fp8.partial_sums(*queries, c, scales, k_r, *rest, **how)
  out = out[:, 0] if splits == 1 else _merge(out, lse)
  return out[:, : T * H].reshape(B, T, H, LATENT)


def _supported(q_c, k_r, c):
  if any(a.dtype != jnp.bfloat16 for a in (q_c, k_r, c)):
    raise NotImplementedError(f'dtype {q_c.dtype}/{c.dtype}, not bfloat16')
  if (q_c.shape[-1], k_r.shape[-1]) != (LATENT, ROPE):
    raise NotImplementedError(
      f'latent {q_c.shape[-1]} and rope {k_r.shape[-1]}, not 512 and 64'
    )
  if c.shape[1] % BLOCK:
    raise NotImplementedError(f'{c.shape[1]} tokens a page, not 64 * n')


def _pick_splits(tiles, longest, sms):
  """Parts per request: fill the device once, two pairs of blocks at least."""
  return max(1, min(sms // tiles, longest // (4 * BLOCK), 32))


def _in_blocks(*pages):
  return [p.reshape(-1, BLOCK, p.shape[-1]) for p in pages]


def _merge(out, lse):
  """out [B splits rows C], lse [B splits rows] (base 2) -> [B rows C]."""
  weights = jax.nn.softmax(lse * math.log(2.0), axis=1)
  weights = jnp.where(lse > _EMPTY / 2, weights, 0)
  merged = jnp.einsum('BSNC,BSN->BNC', out.astype(jnp.float32), weights)
  return merged.astype(out.dtype)


def _partial(
  q_c, q_r, c, k_r, table, lengths, row_new, *, scale, splits, new, page
):
  """Attention of each split alone: out [B splits rows C], lse base 2."""
  B, rows, _ = q_c.shape
  tile = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  kernel = compat.kernel(
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
    scratch={
      'qc': tile(2, ROWS, HALF),
      'qr': tile(ROWS, ROPE),
      'kc': tile(2, 2, BLOCK, HALF),  # block of the pair, half of the columns
      'kr': tile(2, BLOCK, ROPE),  # then probabilities [rows, block]
      'stat': plgpu.SMEM((2, ROWS), jnp.float32),
      'q_here': plgpu.Barrier(num_arrivals=3),
      'k_here': plgpu.Barrier(num_arrivals=3, num_barriers=2),
      'max_here': plgpu.Barrier(num_arrivals=2),
      'p_here': plgpu.Barrier(num_arrivals=2),
      'p_read': plgpu.Barrier(num_arrivals=2),
    },
  )
  return kernel(q_c, q_r, c, k_r, table, lengths, row_new)


def _meet(barrier):
  """Both warpgroups get here before either goes on."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def _body(
  q_c,
  q_r,
  c,
  k_r,
  table,
  lengths,
  row_new,
  out,
  lse,
  qc,
  qr,
  kc,
  kr,
  stat,
  q_here,
  k_here,
  max_here,
  p_here,
  p_read,
  *,
  scale,
  splits,
  new,
  per_page,
):
  b, tile, split, w = (
    lax.axis_index(a) for a in ('request', 'tile', 'split', 'wg')
  )
  length = lengths[b]
  blocks = lax.div(length + (BLOCK - 1), BLOCK)
  pairs = lax.div(blocks + 1, 2)
  per_split = lax.div(pairs + (splits - 1), splits)
  first = split * per_split
  last = jnp.minimum(first + per_split, pairs)
  rows = pl.ds(tile * ROWS, ROWS)

  def place(block):
    """Where a block of the request lies in the cache of all."""
    # The second block of a last pair may be past the end: any page will do,
    # its keys are masked.
    block = jnp.minimum(block, blocks - 1)
    page = table[b, lax.div(block, per_page)]
    return page * per_page + lax.rem(block, per_page)

  def load_half(pair):
    for i in range(2):
      plgpu.copy_gmem_to_smem(
        c.at[place(2 * pair + i), :, pl.ds(w * HALF, HALF)],
        kc.at[i, w],
        k_here.at[i],
      )

  def load_rope(pair):
    plgpu.copy_gmem_to_smem(k_r.at[place(2 * pair + w)], kr.at[w], k_here.at[w])

  @pl.when(w == 0)
  def _():
    for i in range(2):
      plgpu.copy_gmem_to_smem(
        q_c.at[b, rows, pl.ds(i * HALF, HALF)], qc.at[i], q_here
      )
    plgpu.copy_gmem_to_smem(q_r.at[b, rows], qr, q_here)

  @pl.when(first < last)
  def _():
    load_half(first)
    load_rope(first)

  plgpu.barrier_wait(q_here)
  by_row = plgpu.Layout.WGMMA.reduce(1)
  seen = compat.load(row_new, rows, by_row, optimized=False)
  seen = seen + (length - (new - 1))

  def scores(pair):
    def products(ref):
      # A loop, not two calls: unrolled, the descriptors spill (measured).
      def half(i, _):
        compat.wgmma(ref, qc.at[i], compat.transposed(kc.at[w, i]))
        return ()

      lax.fori_loop(0, 2, half, ())
      compat.wgmma(ref, qr, compat.transposed(kr.at[w]))
      return ref[...]

    s = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32)) * scale
    key = plgpu.broadcasted_iota(
      jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA
    )
    left = seen - (2 * pair + w) * BLOCK
    left = lax.broadcast_in_dim(left, s.shape, [0])
    return jnp.where(key < left, s, -jnp.inf)

  def clear(pair):
    """Zeros behind the length: anything may lie there, and 0 * nan is nan."""

    def part(j, _):
      i, columns = lax.div(j, 4), pl.ds(lax.rem(j, 4) * 64, 64)
      x = compat.load(kc, (i, w, slice(None), columns), plgpu.Layout.WGMMA)
      # By row: a number per entry would spill on jax 0.10.
      row = plgpu.broadcasted_iota(
        jnp.int32, (BLOCK, 8), 0, layout=plgpu.Layout.WGMMA
      ).max(axis=1)
      left = length - (2 * pair + i) * BLOCK - row
      here = lax.broadcast_in_dim(left, x.shape, [0]) > 0
      kc[i, w, :, columns] = jnp.where(here, x, jnp.zeros_like(x))
      return ()

    lax.fori_loop(0, 8, part, ())
    plgpu.commit_smem()

  def step(pair, carry):
    acc, top, total = carry
    plgpu.barrier_wait(k_here.at[w])
    s = scores(pair)
    own = s.max(axis=1)
    stat[w] = own
    _meet(max_here)
    other = compat.load(stat, 1 - w, by_row)
    new_top = jnp.maximum(top, jnp.maximum(own, other))
    p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    kr[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    _meet(p_here)
    plgpu.barrier_wait(k_here.at[1 - w])
    pl.when((2 * pair + 2) * BLOCK > length)(lambda: clear(pair))
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])

    def weigh(ref):
      for i in range(2):
        compat.wgmma(ref, kr.at[i], kc.at[i, w])
      plgpu.wgmma_wait(0)

    acc = compat.accumulate(acc, weigh)
    pl.when(pair + 1 < last)(lambda: load_half(pair + 1))
    _meet(p_read)
    pl.when(pair + 1 < last)(lambda: load_rope(pair + 1))
    return acc, new_top, total

  acc, top, total = lax.fori_loop(
    first,
    last,
    step,
    (
      compat.full((ROWS, HALF), 0.0, plgpu.Layout.WGMMA),
      compat.full((ROWS,), _EMPTY, by_row),
      compat.full((ROWS,), 0.0, by_row),
    ),
  )
  stat[w] = total
  _meet(max_here)
  total = total + compat.load(stat, 1 - w, by_row)
  safe = jnp.where(total > 0, total, 1.0)
  qc[w] = (acc / lax.broadcast_in_dim(safe, acc.shape, [0])).astype(
    jnp.bfloat16
  )
  _meet(p_here)  # both have read the sums

  @pl.when(w == 0)
  def _():
    stat[0] = jnp.where(total > 0, top + jnp.log2(safe), _EMPTY)

  plgpu.commit_smem()
  columns = pl.ds(w * HALF, HALF)
  plgpu.copy_smem_to_gmem(qc.at[w], out.at[b, split, rows, columns])
  pl.when(w == 0)(
    lambda: plgpu.copy_smem_to_gmem(stat.at[0], lse.at[b, split, rows])
  )
  plgpu.wait_smem_to_gmem(0)
