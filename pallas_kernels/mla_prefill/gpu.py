"""Causal attention 192/128 on Hopper, forward and backward.

This module computes the output and the log-sum-exp of each query; backward.py
has the two kernels of the gradient.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.mla_prefill import backward, causal_blocks
from pallas_kernels.mla_prefill.causal_blocks import (
  BLOCK,
  BY_ROW,
  LOG2E,
  ROWS,
  STAGES,
  TILE,
  VALUE,
  WIDE,
)


def mla_prefill(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> jax.Array:
  """Returns the attention [B T H 128], bfloat16; pads T to 128 * n."""
  if any(a.dtype != jnp.bfloat16 for a in (q, k, v)):
    raise NotImplementedError(f'dtype {q.dtype}/{v.dtype}, not bfloat16')
  if (q.shape[-1], v.shape[-1]) != (WIDE, VALUE):
    raise NotImplementedError(
      f'dims {q.shape[-1]} and {v.shape[-1]}, not 192 and 128'
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
def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> jax.Array:
  """Returns the output alone; its gradient is the kernels of backward.py."""
  return _forward(q, k, v, starts, scale)[0]


def _fwd(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> tuple:
  """Returns the output and what the backward pass keeps."""
  out, lse = _forward(q, k, v, starts, scale)
  return out, (q, k, v, starts, out, lse)


def _bwd(scale: float, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of q, k and v."""
  q, k, v, starts, out, lse = saved
  grad = grad.astype(jnp.bfloat16)
  # delta = <grad, out>: what the softmax's gradient subtracts in every row.
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  delta = product.sum(-1).swapaxes(1, 2)  # [B H T]
  args = (q, k, v, grad, lse, delta)
  dq = backward.queries(*args, starts, scale)
  dk, dv = backward.keys(*args, _segment_ends(starts), scale)
  return dq, dk, dv, None


_attend.defvjp(_fwd, _bwd)


def _segment_ends(starts: jax.Array) -> jax.Array:
  """Returns the index of the last token of each token's segment, [B T]."""
  at = jnp.arange(starts.shape[1], dtype=jnp.int32)
  last = jnp.pad(
    starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True
  )
  # The nearest last token at or behind each position.
  ends = jnp.where(last, at, starts.shape[1])
  return lax.cummin(ends, axis=1, reverse=True)


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B T H V] and its log-sum-exp [B H T], base 2."""
  B, T, H, _ = q.shape
  return compat.kernel(
    functools.partial(_forward_body, scale=scale * LOG2E),
    (
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    ),
    grid=causal_blocks.grid(q),
    threads=2,
    scratch={
      'qs': causal_blocks.memory(2, ROWS, WIDE),
      'ks': causal_blocks.memory(STAGES, BLOCK, WIDE),
      'vs': causal_blocks.memory(STAGES, BLOCK, VALUE),
      'ps': causal_blocks.memory(2, ROWS, BLOCK),
      'os': causal_blocks.memory(2, ROWS, VALUE),
      'stat': plgpu.SMEM((2, ROWS), jnp.float32),
      'q_here': plgpu.Barrier(num_barriers=2),
      'k_here': plgpu.Barrier(num_barriers=STAGES),
      'v_here': plgpu.Barrier(num_barriers=STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    },
  )(q, k, v, starts)


def _forward_body(
  q: jax.Ref, k: jax.Ref, v: jax.Ref, starts: jax.Ref, out: jax.Ref,
  lse: jax.Ref, qs: jax.Ref, ks: jax.Ref, vs: jax.Ref, ps: jax.Ref, os: jax.Ref,
  stat: jax.Ref, q_here: jax.Ref, k_here: jax.Ref, v_here: jax.Ref,
  free: jax.Ref, *, scale: float,
) -> None:  # fmt: skip
  """Computes the attention of 128 queries of one head."""
  b, h, m, w = causal_blocks.place(q.shape[1] // TILE)
  top_row = m * TILE + w * ROWS
  rows = pl.ds(top_row, ROWS)
  # Load: the queries stay, keys and values stream past them.
  plgpu.copy_gmem_to_smem(q.at[b, rows, h], qs.at[w], q_here.at[w])
  # Blocks before the first query's segment hold nothing to attend to.
  first = lax.div(starts[b, m * TILE], BLOCK)
  steps = (m + 1) * (TILE // BLOCK) - first
  begin = compat.load(starts, (b, rows), BY_ROW, optimized=False)

  def load(i: jax.Array, stage: jax.Array) -> None:
    where = pl.ds((first + i) * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(k.at[b, where, h], ks.at[stage], k_here.at[stage])
    plgpu.copy_gmem_to_smem(v.at[b, where, h], vs.at[stage], v_here.at[stage])

  def use(i: jax.Array, stage: jax.Array, carry: tuple) -> tuple:
    acc, top, total = carry
    # Scores: of the keys alone; the values may still be on their way.
    plgpu.barrier_wait(k_here.at[stage])
    s = causal_blocks.product(qs.at[w], ks.at[stage], BLOCK) * scale
    # Mask: causal, and within the query's segment.
    key = causal_blocks.iota(s.shape, 1, (first + i) * BLOCK)
    seen = (key <= causal_blocks.iota(s.shape, 0, top_row)) & (
      key >= causal_blocks.wide(begin, s.shape)
    )
    s = jnp.where(seen, s, -jnp.inf)
    # Softmax: online; a row lies in one warpgroup, nothing is exchanged.
    new_top = jnp.maximum(top, s.max(axis=1))
    p = jnp.exp2(s - causal_blocks.wide(new_top, s.shape))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    ps[w] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    # Values: the sum so far shrinks by as much as the maximum rose.
    plgpu.barrier_wait(v_here.at[stage])
    acc = acc * causal_blocks.wide(shrink, acc.shape)
    return (
      causal_blocks.add_product(acc, ps.at[w], vs.at[stage]),
      new_top,
      total,
    )

  plgpu.barrier_wait(q_here.at[w])
  carry = (
    causal_blocks.zeros(VALUE),
    compat.full((ROWS,), -1e30, BY_ROW),
    compat.full((ROWS,), 0.0, BY_ROW),
  )
  acc, top, total = causal_blocks.stream(steps, load, use, carry, free)
  # Store: the output, and the log-sum-exp for the backward pass.
  os[w] = (acc / causal_blocks.wide(total, acc.shape)).astype(jnp.bfloat16)
  stat[w] = top + jnp.log2(total)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(os.at[w], out.at[b, rows, h])
  plgpu.copy_smem_to_gmem(stat.at[w], lse.at[b, h, rows])
  plgpu.wait_smem_to_gmem(0)
