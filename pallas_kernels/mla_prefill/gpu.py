"""Causal attention 192/128 on Hopper, forward and backward.

Three kernels, each with two warpgroups of 64 rows and a ring of blocks that
warpgroup 0 refills: output and log-sum-exp; gradient of the queries, walking
the keys; gradient of keys and values, walking the queries. Scores are computed
again in the backward, as in FlashAttention-2 (arXiv:2307.08691).
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

TILE, ROWS, BLOCK, STAGES = 128, 64, 64, 2
WIDE, VALUE = 192, 128  # dims of queries and keys, of values
_WGMMA = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2E = math.log2(math.e)


def mla_prefill(q, k, v, starts, scale):
  if any(a.dtype != jnp.bfloat16 for a in (q, k, v)):
    raise NotImplementedError(f'dtype {q.dtype}/{v.dtype}, not bfloat16')
  if (q.shape[-1], v.shape[-1]) != (WIDE, VALUE):
    raise NotImplementedError(
      f'dims {q.shape[-1]} and {v.shape[-1]}, not {WIDE} and {VALUE}'
    )
  T = q.shape[1]
  pad = -T % TILE
  if pad:
    # One more segment, behind all others.
    wide = lambda a: jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q, k, v = wide(q), wide(k), wide(v)
    starts = jnp.pad(starts, ((0, 0), (0, pad)), constant_values=T)
  return _attend(q, k, v, starts, scale)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, starts, scale):
  return _forward(q, k, v, starts, scale)[0]


def _fwd(q, k, v, starts, scale):
  out, lse = _forward(q, k, v, starts, scale)
  return out, (q, k, v, starts, out, lse)


def _bwd(scale, saved, grad):
  q, k, v, starts, out, lse = saved
  grad = grad.astype(jnp.bfloat16)
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  delta = product.sum(-1).swapaxes(1, 2)  # [B H T]
  args = (q, k, v, grad, lse, delta)
  dq = _queries(*args, starts, scale)
  dk, dv = _keys(*args, _segment_ends(starts), scale)
  return dq, dk, dv, None


_attend.defvjp(_fwd, _bwd)


def _segment_ends(starts):
  """[B T] -> index of the last token of each token's segment."""
  at = jnp.arange(starts.shape[1], dtype=jnp.int32)
  last = jnp.pad(
    starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True
  )
  ends = jnp.where(last, at, starts.shape[1])
  return lax.cummin(ends, axis=1, reverse=True)


def _memory(*shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=compat.TILED_16BIT)


def _grid(q):
  return {'b': q.shape[0], 'h': q.shape[2], 'm': q.shape[1] // TILE}


def _place(tiles):
  """Batch, head, tile and warpgroup; the longest tiles start first."""
  b, h, m, w = (lax.axis_index(a) for a in ('b', 'h', 'm', 'wg'))
  return b, h, tiles - 1 - m, w


def _stream(steps, load, use, carry, free):
  """carry = use(step, stage, carry), with the next blocks on their way."""
  w = lax.axis_index('wg')

  @pl.when(w == 0)
  def _():
    def fill(step, _):
      load(step, step)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  def step(i, carry):
    stage = lax.rem(i, STAGES)
    carry = use(i, stage, carry)

    @pl.when(i + STAGES < steps)
    def _():
      plgpu.barrier_arrive(free.at[stage])

      @pl.when(w == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(i + STAGES, stage)

    return carry

  return lax.fori_loop(0, steps, step, carry)


def _product(a, b, columns):
  """a @ b.T of refs, a float32 [64, columns] in registers."""

  def run(ref):
    def part(i, _):
      inner = (slice(None), pl.ds(i * 64, 64))
      plgpu.wgmma(ref, a.at[inner], compat.transposed(b.at[inner]))
      return ()

    lax.fori_loop(0, a.shape[1] // 64, part, ())
    return ref[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))


def _add_product(acc, a, b):
  """acc + a @ b of refs."""

  def run(ref):
    plgpu.wgmma(ref, a, b)
    plgpu.wgmma_wait(0)

  return compat.accumulate(acc, run)


def _wide(values, shape, axis=0):
  return lax.broadcast_in_dim(values, shape, [axis])


def _iota(shape, axis, offset):
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WGMMA) + offset


def _zeros(columns):
  return compat.full((ROWS, columns), 0.0, _WGMMA)


def _forward(q, k, v, starts, scale):
  """Output [B T H V] and base-2 log-sum-exp [B H T] of scaled scores."""
  B, T, H, _ = q.shape
  return compat.kernel(
    functools.partial(_forward_body, scale=scale * _LOG2E),
    (
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    ),
    grid=_grid(q),
    threads=2,
    scratch={
      'qs': _memory(2, ROWS, WIDE),
      'ks': _memory(STAGES, BLOCK, WIDE),
      'vs': _memory(STAGES, BLOCK, VALUE),
      'ps': _memory(2, ROWS, BLOCK),
      'os': _memory(2, ROWS, VALUE),
      'stat': plgpu.SMEM((2, ROWS), jnp.float32),
      'q_here': plgpu.Barrier(num_barriers=2),
      'k_here': plgpu.Barrier(num_barriers=STAGES),
      'v_here': plgpu.Barrier(num_barriers=STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    },
  )(q, k, v, starts)


def _forward_body(
  q, k, v, starts, out, lse,
  qs, ks, vs, ps, os, stat, q_here, k_here, v_here, free, *, scale,
):  # fmt: skip
  b, h, m, w = _place(q.shape[1] // TILE)
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  plgpu.copy_gmem_to_smem(q.at[b, rows, h], qs.at[w], q_here.at[w])
  first = lax.div(starts[b, m * TILE], BLOCK)
  steps = (m + 1) * (TILE // BLOCK) - first
  begin = compat.load(starts, (b, rows), _BY_ROW, optimized=False)

  def load(i, stage):
    where = pl.ds((first + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(k.at[b, where, h], ks.at[stage], k_here.at[stage])
    plgpu.copy_gmem_to_smem(v.at[b, where, h], vs.at[stage], v_here.at[stage])

  def use(i, stage, carry):
    acc, top, total = carry
    plgpu.barrier_wait(k_here.at[stage])
    s = _product(qs.at[w], ks.at[stage], BLOCK) * scale
    key = _iota(s.shape, 1, (first + i) * BLOCK)
    seen = (key <= _iota(s.shape, 0, top_row)) & (key >= _wide(begin, s.shape))
    s = jnp.where(seen, s, -jnp.inf)
    new_top = jnp.maximum(top, s.max(axis=1))
    p = jnp.exp2(s - _wide(new_top, s.shape))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_wait(v_here.at[stage])
    acc = acc * _wide(shrink, acc.shape)
    return _add_product(acc, ps.at[w], vs.at[stage]), new_top, total

  plgpu.barrier_wait(q_here.at[w])
  carry = (
    _zeros(VALUE),
    compat.full((ROWS,), -1e30, _BY_ROW),
    compat.full((ROWS,), 0.0, _BY_ROW),
  )
  acc, top, total = _stream(steps, load, use, carry, free)
  os[w] = (acc / _wide(total, acc.shape)).astype(jnp.bfloat16)
  stat[w] = top + jnp.log2(total)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(os.at[w], out.at[b, rows, h])
  plgpu.copy_smem_to_gmem(stat.at[w], lse.at[b, h, rows])
  plgpu.wait_smem_to_gmem(0)


def _queries(q, k, v, grad, lse, delta, starts, scale):
  """Gradient of the queries."""
  return compat.kernel(
    functools.partial(_queries_body, scale=scale),
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=_grid(q),
    threads=2,
    scratch={
      'qs': _memory(2, ROWS, WIDE),
      'gs': _memory(2, ROWS, VALUE),
      'ks': _memory(STAGES, BLOCK, WIDE),
      'vs': _memory(STAGES, BLOCK, VALUE),
      'ds': _memory(2, ROWS, BLOCK),
      'own_here': plgpu.Barrier(num_arrivals=2, num_barriers=2),
      'here': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    },
  )(q, k, v, grad, lse, delta, starts)


def _queries_body(
  q, k, v, grad, lse, delta, starts, out,
  qs, gs, ks, vs, ds, own_here, here, free, *, scale,
):  # fmt: skip
  b, h, m, w = _place(q.shape[1] // TILE)
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  plgpu.copy_gmem_to_smem(q.at[b, rows, h], qs.at[w], own_here.at[w])
  plgpu.copy_gmem_to_smem(grad.at[b, rows, h], gs.at[w], own_here.at[w])
  first = lax.div(starts[b, m * TILE], BLOCK)
  steps = (m + 1) * (TILE // BLOCK) - first
  by_row = lambda ref, *at: compat.load(ref, at, _BY_ROW, optimized=False)
  begin = by_row(starts, b, rows)
  norm, shift = by_row(lse, b, h, rows), by_row(delta, b, h, rows)

  def load(i, stage):
    where = pl.ds((first + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(k.at[b, where, h], ks.at[stage], here.at[stage])
    plgpu.copy_gmem_to_smem(v.at[b, where, h], vs.at[stage], here.at[stage])

  def use(i, stage, acc):
    plgpu.barrier_wait(here.at[stage])
    s = _product(qs.at[w], ks.at[stage], BLOCK) * (scale * _LOG2E)
    key = _iota(s.shape, 1, (first + i) * BLOCK)
    seen = (key <= _iota(s.shape, 0, top_row)) & (key >= _wide(begin, s.shape))
    p = jnp.exp2(jnp.where(seen, s, -jnp.inf) - _wide(norm, s.shape))
    dp = _product(gs.at[w], vs.at[stage], BLOCK)
    ds[w] = (p * (dp - _wide(shift, p.shape)) * scale).astype(jnp.bfloat16)
    plgpu.commit_smem()
    return _add_product(acc, ds.at[w], ks.at[stage])

  plgpu.barrier_wait(own_here.at[w])
  acc = _stream(steps, load, use, _zeros(WIDE), free)
  qs[w] = acc.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(qs.at[w], out.at[b, rows, h])
  plgpu.wait_smem_to_gmem(0)


def _keys(q, k, v, grad, lse, delta, ends, scale):
  """Gradients of the keys and of the values."""
  return compat.kernel(
    functools.partial(_keys_body, scale=scale),
    (
      jax.ShapeDtypeStruct(k.shape, k.dtype),
      jax.ShapeDtypeStruct(v.shape, v.dtype),
    ),
    grid=_grid(q),
    threads=2,
    scratch={
      'ks': _memory(2, ROWS, WIDE),
      'vs': _memory(2, ROWS, VALUE),
      'qs': _memory(STAGES, BLOCK, WIDE),
      'gs': _memory(STAGES, BLOCK, VALUE),
      'ps': _memory(2, ROWS, BLOCK),
      'norms': plgpu.SMEM((STAGES, BLOCK), jnp.float32),
      'shifts': plgpu.SMEM((STAGES, BLOCK), jnp.float32),
      'own_here': plgpu.Barrier(num_arrivals=2, num_barriers=2),
      'here': plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    },
  )(q, k, v, grad, lse, delta, ends)


def _keys_body(
  q, k, v, grad, lse, delta, ends, dk, dv,
  ks, vs, qs, gs, ps, norms, shifts, own_here, here, free, *, scale,
):  # fmt: skip
  b, h, w = (lax.axis_index(a) for a in ('b', 'h', 'wg'))
  m = lax.axis_index('m')  # the first keys have the most queries
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  plgpu.copy_gmem_to_smem(k.at[b, rows, h], ks.at[w], own_here.at[w])
  plgpu.copy_gmem_to_smem(v.at[b, rows, h], vs.at[w], own_here.at[w])
  first = m * (TILE // BLOCK)
  steps = lax.div(ends[b, m * TILE + TILE - 1], BLOCK) + 1 - first
  end = compat.load(ends, (b, rows), _BY_ROW, optimized=False)

  def load(i, stage):
    where = pl.ds((first + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q.at[b, where, h], qs.at[stage], here.at[stage])
    plgpu.copy_gmem_to_smem(grad.at[b, where, h], gs.at[stage], here.at[stage])
    for vector, copy in ((lse, norms), (delta, shifts)):
      plgpu.copy_gmem_to_smem(
        vector.at[b, h, where], copy.at[stage], here.at[stage]
      )

  def by_query(ref, stage, shape):
    return _wide(compat.load(ref, stage, _BY_COLUMN), shape, 1)

  def use(i, stage, carry):
    acc_k, acc_v = carry
    plgpu.barrier_wait(here.at[stage])
    s = _product(ks.at[w], qs.at[stage], BLOCK) * (scale * _LOG2E)
    query = _iota(s.shape, 1, (first + i) * BLOCK)
    seen = (query >= _iota(s.shape, 0, top_row)) & (
      query <= _wide(end, s.shape)
    )
    p = jnp.exp2(jnp.where(seen, s, -jnp.inf) - by_query(norms, stage, s.shape))
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    acc_v = _add_product(acc_v, ps.at[w], gs.at[stage])
    dp = _product(vs.at[w], gs.at[stage], BLOCK)
    # Read back rather than kept: it would spill.
    p = compat.load(ps, w, _WGMMA).astype(jnp.float32)
    d = p * (dp - by_query(shifts, stage, p.shape)) * scale
    ps[w] = d.astype(jnp.bfloat16)
    plgpu.commit_smem()
    return _add_product(acc_k, ps.at[w], qs.at[stage]), acc_v

  plgpu.barrier_wait(own_here.at[w])
  carry = (_zeros(WIDE), _zeros(VALUE))
  acc_k, acc_v = _stream(steps, load, use, carry, free)
  ks[w] = acc_k.astype(jnp.bfloat16)
  vs[w] = acc_v.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(ks.at[w], dk.at[b, rows, h])
  plgpu.copy_smem_to_gmem(vs.at[w], dv.at[b, rows, h])
  plgpu.wait_smem_to_gmem(0)
