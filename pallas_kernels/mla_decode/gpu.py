"""Absorbed latent attention on Hopper: two warpgroups, each half the output.

A thread block holds 64 query rows (heads and new tokens of one request) and
walks pairs of 64-token blocks. Warpgroup w scores block w of the pair and sums
columns [256 w, 256 w + 256) over both blocks (see latent_blocks).

Two warpgroups get 255 registers a thread without setmaxnreg, which some
compilers ignore, so there is no warpgroup for loading: each refills the tile
that it was the last to read. Probabilities overwrite the rotary tile they came
from. Legend: as in mla_decode; N query rows, T H to a multiple of 64.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, latent_blocks
from pallas_kernels.latent_blocks import (
  BY_ROW,
  EMPTY,
  HALF,
  LATENT,
  LOG2E,
  ROPE,
  ROWS,
  WGMMA,
)
from pallas_kernels.mla_decode import fp8_latents

BLOCK = 64


def mla_decode(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  scale: float,
  scales: jax.Array | None,
  splits: int | None,
) -> jax.Array:
  """Returns the attention of the new tokens [B T H C], bfloat16.

  Raises:
    NotImplementedError: dtypes, widths or a page that the kernels can't take.
  """
  check_pages(q_c.dtype, c, k_r, scales)
  B, T, H, _ = q_c.shape
  # Heads and new tokens are rows alike: all of them share the cached tokens.
  rows = -(-T * H // ROWS) * ROWS
  pad = lambda q: jnp.pad(
    q.reshape(B, T * H, -1), ((0, 0), (0, rows - T * H), (0, 0))
  )
  # Padded rows count as the last token's; their output is dropped.
  row_new = jnp.minimum(jnp.arange(rows, dtype=jnp.int32) // H, T - 1)
  if splits is None:
    longest = table.shape[1] * c.shape[1]
    splits = _pick_splits(B * rows // ROWS, longest, compat.num_sms())
  queries, rest = (pad(q_c), pad(q_r)), (table, lengths, row_new)
  how = {'scale': scale, 'splits': splits, 'new': T, 'page': c.shape[1]}
  if scales is None:
    out, lse = _partial_sums(*queries, *_in_blocks(c, k_r), *rest, **how)
  else:
    pages = _in_blocks(c, scales, k_r)
    out, lse = fp8_latents.partial_sums(*queries, *pages, *rest, **how)
  out = out[:, 0] if splits == 1 else _merge(out, lse)
  return out[:, : T * H].reshape(B, T, H, LATENT)


def check_pages(
  queries: jnp.dtype, c: jax.Array, k_r: jax.Array, scales: jax.Array | None
) -> None:
  """Raises NotImplementedError for pages [... P G C] that it can't take.

  Args:
    queries: their dtype.
    c, k_r, scales: as in mla_decode.
  """
  if scales is not None:
    fp8_latents.check_dtypes(queries, c, scales, k_r)
  else:
    _check_dtypes(queries, k_r.dtype, c.dtype)
  _check_sizes(c, k_r)


def _check_sizes(c: jax.Array, k_r: jax.Array) -> None:
  """Raises NotImplementedError for widths or a page that it can't take."""
  latent_blocks.check_dims(c.shape[-1], k_r.shape[-1])
  if c.shape[-2] % BLOCK:
    raise NotImplementedError(f'{c.shape[-2]} tokens a page, not 64 * n')


def _check_dtypes(*dtypes: jnp.dtype) -> None:
  """Raises NotImplementedError unless all dtypes are bfloat16."""
  if any(dtype != jnp.bfloat16 for dtype in dtypes):
    raise NotImplementedError(
      f'dtype {"/".join(dict.fromkeys(map(str, dtypes)))}, not bfloat16'
    )


def _pick_splits(tiles: int, longest: int, sms: int) -> int:
  """Returns splits of a request: fill the device once, 2 pairs of blocks each.

  Args:
    tiles: thread blocks without splits.
    longest: tokens that a request can have.
    sms: multiprocessors of the device.
  """
  return max(1, min(sms // tiles, longest // (4 * BLOCK), 32))


def _in_blocks(*pages: jax.Array) -> list[jax.Array]:
  """Returns pages [P G D] as blocks [P*G/64 64 D]."""
  return [p.reshape(-1, BLOCK, p.shape[-1]) for p in pages]


def _merge(out: jax.Array, lse: jax.Array) -> jax.Array:
  """Combines out [B splits N C] by lse [B splits N] (base 2): [B N C]."""
  weights = jax.nn.softmax(lse * math.log(2.0), axis=1)
  # A split without tokens for a row has no weight, not an equal one.
  weights = jnp.where(lse > EMPTY / 2, weights, 0)
  merged = jnp.einsum('BSNC,BSN->BNC', out.astype(jnp.float32), weights)
  return merged.astype(out.dtype)


def _partial_sums(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  row_new: jax.Array,
  *,
  scale: float,
  splits: int,
  new: int,
  page: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention of each split alone, to be merged by its lse.

  Args:
    q_c, q_r: [B N C] and [B N R] queries.
    c, k_r: [blocks 64 C] and [blocks 64 R], the cache of all requests.
    table, lengths: as in mla_decode.
    row_new: [N] int32, the new token that each row belongs to.
    scale: of the scores.
    splits: parts of a request's tokens.
    new: T.
    page: G.

  Returns:
    out [B splits N C] bfloat16 and lse [B splits N] float32, base 2.
  """
  B, rows, _ = q_c.shape
  tile = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  kernel = compat.kernel(
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


def _clear(kc: jax.Ref, pair: jax.Array, length: jax.Array) -> None:
  """Zeros latents behind the length: any bits lie there, and 0 * nan is nan."""
  w = lax.axis_index('wg')

  def part(j: jax.Array, _) -> tuple:
    i, columns = lax.div(j, 4), pl.ds(lax.rem(j, 4) * 64, 64)
    x = compat.load(kc, (i, w, slice(None), columns), WGMMA)
    # By row: a number per entry would spill on jax 0.10.
    row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 8), 0, layout=WGMMA)
    left = length - (2 * pair + i) * BLOCK - row.max(axis=1)
    here = latent_blocks.wide(left, x.shape) > 0
    kc[i, w, :, columns] = jnp.where(here, x, jnp.zeros_like(x))
    return ()

  lax.fori_loop(0, 8, part, ())
  plgpu.commit_smem()


def _body(
  q_c: jax.Ref, q_r: jax.Ref, c: jax.Ref, k_r: jax.Ref, table: jax.Ref,
  lengths: jax.Ref, row_new: jax.Ref, out: jax.Ref, lse: jax.Ref, qc: jax.Ref,
  qr: jax.Ref, kc: jax.Ref, kr: jax.Ref, stat: jax.Ref, q_here: jax.Ref,
  k_here: jax.Ref, max_here: jax.Ref, p_here: jax.Ref, p_read: jax.Ref, *,
  scale: float, splits: int, new: int, per_page: int,
) -> None:  # fmt: skip
  """Computes 64 query rows over one split of a request's tokens."""
  b, tile, split, w = (
    lax.axis_index(a) for a in ('request', 'tile', 'split', 'wg')
  )
  length, rows = lengths[b], pl.ds(tile * ROWS, ROWS)
  blocks = lax.div(length + (BLOCK - 1), BLOCK)
  pairs = lax.div(blocks + 1, 2)
  per_split = lax.div(pairs + (splits - 1), splits)
  first = split * per_split
  last = jnp.minimum(first + per_split, pairs)

  def place(block: jax.Array) -> jax.Array:
    # The second block of a last pair may be past the end: any page will do,
    # its keys are masked.
    block = jnp.minimum(block, blocks - 1)
    page = table[b, lax.div(block, per_page)]
    return page * per_page + lax.rem(block, per_page)

  def load_half(pair: jax.Array) -> None:
    for i in range(2):
      plgpu.copy_gmem_to_smem(
        c.at[place(2 * pair + i), :, pl.ds(w * HALF, HALF)],
        kc.at[i, w],
        k_here.at[i],
      )

  def load_rope(pair: jax.Array) -> None:
    plgpu.copy_gmem_to_smem(k_r.at[place(2 * pair + w)], kr.at[w], k_here.at[w])

  # Load: the queries stay, the tokens come one pair of blocks at a time.
  latent_blocks.load_queries(q_c, q_r, (b, rows), qc, qr, q_here)

  @pl.when(first < last)
  def _():
    load_half(first)
    load_rope(first)

  plgpu.barrier_wait(q_here)
  # New token t attends to all but the T - 1 - t newest tokens.
  seen = compat.load(row_new, rows, BY_ROW, optimized=False)
  seen = seen + (length - (new - 1))

  def step(
    pair: jax.Array, running: latent_blocks.Running
  ) -> latent_blocks.Running:
    # Scores: this warpgroup's block, all columns.
    plgpu.barrier_wait(k_here.at[w])
    s = latent_blocks.scores(qc, qr, lambda i: kc.at[w, i], kr.at[w], scale)
    s = latent_blocks.mask_from(s, seen - (2 * pair + w) * BLOCK)
    # Softmax: over both blocks, so the maxima cross over.
    own = latent_blocks.publish_max(s, stat, max_here)
    shrink, running = latent_blocks.softmax_step(
      s, own, running, stat, kr, p_here
    )
    # Values: both blocks, this warpgroup's columns.
    plgpu.barrier_wait(k_here.at[1 - w])
    pl.when((2 * pair + 2) * BLOCK > length)(lambda: _clear(kc, pair, length))
    latents = lambda i: kc.at[i, w]
    running = latent_blocks.weigh(running, shrink, kr, latents)
    # Refill: nobody else reads these columns; the probabilities both do.
    pl.when(pair + 1 < last)(lambda: load_half(pair + 1))
    latent_blocks.meet(p_read)
    pl.when(pair + 1 < last)(lambda: load_rope(pair + 1))
    return running

  running = lax.fori_loop(first, last, step, latent_blocks.start())
  latent_blocks.finish(
    running,
    qc,
    stat,
    (max_here, p_here),
    out.at[b, split, rows, pl.ds(w * HALF, HALF)],
    lse.at[b, split, rows],
  )
