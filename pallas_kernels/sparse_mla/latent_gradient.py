"""Gradient of the latents of attention over gathered latents on Hopper.

One kernel takes 64 latents of a query, walks its heads 32 at a time and stores
what that query adds to the gradient of each: warpgroup 0 computes
probabilities, warpgroup 1 their gradients, and each sums half of the columns.
Another adds these parts to every latent, in order of the queries, found by a
stable sort. So nothing is added atomically, and with a chunk of queries at a
time the parts take no more than about half a GiB.
Legend: N queries of all rows, H heads (padded), K chosen (padded), M parts, C
latent, R rope dim.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.latent_blocks import (
  BY_COLUMN,
  BY_ROW,
  LOG2E,
  ROPE,
  WGMMA,
  add,
)
from pallas_kernels.sparse_mla.gathered_blocks import (
  BLOCK,
  PART,
  THIN,
  mask_unchosen,
  memory,
  product,
  shared_pair,
  steps,
  zeros,
)
from pallas_kernels.warpgroups import meet, wide

_PARTS = 2**28  # most numbers in the stored parts of a chunk of queries
_ROPE_ROOM = 128  # a part's rotary row, of which a warpgroup reads 128 numbers
_IN_FLIGHT = 8  # parts that a warpgroup reads at once


def latents(
  queries: tuple[jax.Array | None, ...],
  c: jax.Array,
  k_r: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the gradients of c and k_r in float32, chunk by chunk of queries.

  queries: q_c, q_r, grad, lse, delta and at.
  """
  N, K = queries[-1].shape
  width = sum(a.shape[1] for a in (c, k_r) if a is not None)
  size = max(1, min(N, _PARTS // (K * width)))
  chunks = -(-N // size)
  # Queries that are none choose nothing.
  fill = lambda a: -1 if a is queries[-1] else 0
  tall = lambda a: jnp.pad(
    a,
    ((0, chunks * size - N),) + ((0, 0),) * (a.ndim - 1),
    constant_values=fill(a),
  )
  chunked = jax.tree.map(
    lambda a: tall(a).reshape(chunks, size, *a.shape[1:]), tuple(queries)
  )

  def chunk(totals: tuple, own: tuple) -> tuple:
    parts = store_parts(*own, c, k_r, scale)
    order, starts = _lists(own[-1].reshape(-1), c.shape[0])
    return add_parts(*totals, *parts, order, starts), None

  zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (c, k_r))
  return lax.scan(chunk, zero, chunked)[0]


def _lists(at: jax.Array, latents: int) -> tuple[jax.Array, jax.Array]:
  """Sorts at [M] by latent: order [M] and starts [latents + 1], int32."""
  order = jnp.argsort(at, stable=True).astype(jnp.int32)
  bounds = jnp.arange(latents + 1, dtype=at.dtype)
  return order, jnp.searchsorted(at[order], bounds).astype(jnp.int32)


def store_parts(
  q_c: jax.Array,
  q_r: jax.Array | None,
  grad: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  at: jax.Array,
  c: jax.Array,
  k_r: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns what each query adds to the gradients of its choices.

  Parts of c are [N*K C] and parts of k_r [N*K 128], of which R are used.

  Behind a query's last choice nothing is written.
  """
  (N, K), C = at.shape, c.shape[1]
  half, rope = C // 2, {}
  parts = lambda width: jax.ShapeDtypeStruct((N * K, width), c.dtype)
  if q_r is not None:
    rope = {'kr': memory(2, BLOCK, THIN), 'qr': memory(2, 2, PART, THIN)}
  return compat.kernel(
    functools.partial(_parts_body, scale=scale),
    (parts(C), parts(_ROPE_ROOM) if rope else None),
    grid={'query': N, 'block': K // BLOCK},
    threads=2,
    across_warps=False,
    scratch={
      'kc': memory(2, BLOCK, half),
      'qc': memory(2, 2, PART, half),  # stage, columns
      'gc': memory(2, 2, PART, half),
      **rope,
      **shared_pair(),
      # Two in turn: one may be read while the next is written.
      'ps': memory(2, BLOCK, PART),
      'here': plgpu.Barrier(num_arrivals=6 if rope else 4, num_barriers=2),
    },
  )(q_c, q_r, grad, lse, delta, at, steps(at, BLOCK), c, k_r)


def _parts_body(
  q_c: jax.Ref, q_r: jax.Ref | None, grad: jax.Ref, lse: jax.Ref,
  delta: jax.Ref, at: jax.Ref, steps: jax.Ref, c: jax.Ref,
  k_r: jax.Ref | None, dc: jax.Ref, dk_r: jax.Ref | None, *, scale: float,
  **scratch: jax.Ref
) -> None:  # fmt: skip
  """Computes one block of 64 choices, if the query has that many."""
  n, block = lax.axis_index('query'), lax.axis_index('block')

  @pl.when(block < steps[n])
  def _():
    given = q_c, q_r, grad, lse, delta, at, c, k_r
    where = {'n': n, 'block': block}
    _one_block(*given, dc, dk_r, **scratch, **where, scale=scale)


def _one_block(
  q_c: jax.Ref, q_r: jax.Ref | None, grad: jax.Ref, lse: jax.Ref,
  delta: jax.Ref, at: jax.Ref, c: jax.Ref, k_r: jax.Ref | None, dc: jax.Ref,
  dk_r: jax.Ref | None, kc: jax.Ref, qc: jax.Ref, gc: jax.Ref, ps: jax.Ref,
  ds: jax.Ref, p_here: jax.Ref, met: jax.Ref, here: jax.Ref,
  kr: jax.Ref | None = None, qr: jax.Ref | None = None, *, n: jax.Array,
  block: jax.Array, scale: float,
) -> None:  # fmt: skip
  """Computes what a query adds to the gradients of 64 latents."""
  w, groups = lax.axis_index('wg'), q_c.shape[1] // PART
  chosen = n, pl.ds(block * BLOCK, BLOCK)
  half, rope = kc.shape[-1], q_r is not None
  columns, thin = pl.ds(w * half, half), pl.ds(w * THIN, THIN)
  turned = ((q_r, qr, thin),) if rope else ()
  # Load: 64 latents stay, the heads stream past them.
  gather.start(c.at[:, columns], at.at[chosen], kc.at[w])
  if rope:
    gather.start(k_r.at[:, thin], at.at[chosen], kr.at[w])
  gather.commit()

  def load(i: jax.Array) -> None:
    stage, heads = lax.rem(i, 2), pl.ds(i * PART, PART)
    for source, dest, part in (
      (q_c, qc, columns),
      *turned,
      (grad, gc, columns),
    ):
      plgpu.copy_gmem_to_smem(
        source.at[n, heads, part], dest.at[stage, w], here.at[stage]
      )

  lax.fori_loop(0, 2, lambda i, _: load(i), None)
  # Wait: each warpgroup has its columns, then both have all.
  there = compat.load(at, chosen, BY_ROW, optimized=False)
  gather.wait(0)
  plgpu.commit_smem()
  meet(met)

  def step(i: jax.Array, carry: tuple) -> tuple:
    stage, heads = lax.rem(i, 2), pl.ds(i * PART, PART)
    by_head = lambda ref: compat.load(
      ref, (n, heads), BY_COLUMN, optimized=False
    )
    # Wait: queries and gradients of 32 heads.
    plgpu.barrier_wait(here.at[stage])

    @pl.when(w == 0)
    def _():
      # Probabilities: recomputed, from the stored log-sum-exp at once.
      norm = by_head(lse)
      turned = kr, qr.at[stage] if rope else None
      s = product((kc, qc.at[stage]), turned) * (scale * LOG2E)
      s = mask_unchosen(s, there, 0)
      ps[stage] = jnp.exp2(s - wide(norm, s.shape, 1)).astype(ps.dtype)
      plgpu.commit_smem()
      plgpu.barrier_arrive(p_here)

    @pl.when(w == 1)
    def _():
      # Gradient of the scores: p (dp - delta).
      shift = by_head(delta)
      dp = product((kc, gc.at[stage]))
      plgpu.barrier_wait(p_here)
      p = compat.load(ps, stage, WGMMA).astype(jnp.float32)
      d = p * (dp - wide(shift, dp.shape, 1)) * scale
      ds[...] = d.astype(ds.dtype)
      plgpu.commit_smem()

    meet(met)
    # Sum: as a value p g, as a key ds q, in this warpgroup's columns.
    acc_c = add(
      carry[0], (ps.at[stage], gc.at[stage, w]), (ds, qc.at[stage, w])
    )
    acc_r = add(carry[1], (ds, qr.at[stage, w])) if rope else None
    # What the other read of these columns, it read before they met.
    pl.when(i + 2 < groups)(lambda: load(i + 2))
    return acc_c, acc_r

  acc_c, acc_r = lax.fori_loop(0, groups, step, zeros(half, rope))
  # Store: by the tiles of the latents, which are no longer needed.
  kc[w] = acc_c.astype(jnp.bfloat16)
  if rope:
    kr[w] = acc_r.astype(jnp.bfloat16)
  plgpu.commit_smem()
  where = pl.ds((n * (at.shape[1] // BLOCK) + block) * BLOCK, BLOCK)
  plgpu.copy_smem_to_gmem(kc.at[w], dc.at[where, columns])
  if rope:
    plgpu.copy_smem_to_gmem(kr.at[w], dk_r.at[where, thin])
  plgpu.wait_smem_to_gmem(0)


def add_parts(
  total_c: jax.Array,
  total_r: jax.Array | None,
  dc: jax.Array,
  dk_r: jax.Array | None,
  order: jax.Array,
  starts: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns total[s] + its parts[order[starts[s]:starts[s + 1]]], in order."""
  totals, parts = (total_c,), (dc,)
  if total_r is not None:
    room = jnp.pad(total_r, ((0, 0), (0, _ROPE_ROOM - ROPE)))
    totals, parts = (total_c, room), (dc, dk_r)
  out_c, *out_r = compat.kernel(
    _add_body,
    tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in totals),
    grid={'latent': total_c.shape[0]},
  )(totals, parts, order, starts)
  return out_c, out_r[0][:, :ROPE] if out_r else None


def _add_body(
  totals: tuple, parts: tuple, order: jax.Ref, starts: jax.Ref, *out: jax.Ref
) -> None:
  """Adds the parts of one latent."""
  s = lax.axis_index('latent')
  first, last = starts[s], starts[s + 1]

  def row(ref: jax.Ref, at: jax.Array) -> jax.Array:
    size = ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=size // 128)
    return compat.load(ref, at, layout, optimized=False)

  def step(i: jax.Array, carry: tuple) -> tuple:
    # Load several parts at once; past the end the last one, as zero.
    places = [first + i * _IN_FLIGHT + j for j in range(_IN_FLIGHT)]
    rows = [order[jnp.minimum(place, last - 1)] for place in places]
    sums = []
    for total, own in zip(carry, parts, strict=True):
      read = [row(own, r).astype(jnp.float32) for r in rows]
      for place, part in zip(places, read, strict=True):
        here = jnp.broadcast_to(place < last, part.shape)
        # Add in the order of the queries: the same bits in every run.
        total = total + jnp.where(here, part, jnp.zeros_like(part))
      sums.append(total)
    return tuple(sums)

  count = lax.div(last - first + (_IN_FLIGHT - 1), _IN_FLIGHT)
  start = tuple(row(total, s) for total in totals)
  sums = lax.fori_loop(0, count, step, start)
  for ref, value in zip(out, sums, strict=True):
    ref[s] = value
