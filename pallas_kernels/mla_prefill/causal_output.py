"""Output of causal attention 192/128 on Hopper."""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.mla_prefill import causal_blocks
from pallas_kernels.mla_prefill.causal_blocks import (
  BY_ROW,
  LOG2E,
  PART,
  ROWS,
  THREADS,
  TILE,
  VALUE,
  WIDE,
)
from pallas_kernels.warpgroups import wide

KEPT = 256  # keys in shared memory
LEAST = float(jnp.finfo(jnp.float32).min)


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B T H V] and its log-sum-exp [B H T], base 2."""
  B, T, H, _ = q.shape
  # Keys of a block: what registers allow, see compat.set_registers.
  keys = 128 if compat.REGISTERS_MOVE else 64
  stages = KEPT // keys
  return compat.kernel(
    functools.partial(_body, keys=keys, scale=scale * LOG2E),
    (
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    ),
    grid=causal_blocks.grid(q),
    threads=THREADS,
    scratch={
      # In parts, for the output leaves by the first two of them.
      'qs': causal_blocks.memory(2, WIDE // PART, ROWS, PART),
      'ks': causal_blocks.memory(stages, keys, WIDE),
      'vs': causal_blocks.memory(stages, keys, VALUE),
      'stat': plgpu.SMEM((2, ROWS), jnp.float32),
      'q_here': plgpu.Barrier(num_arrivals=WIDE // PART, num_barriers=2),
      'k_here': plgpu.Barrier(num_barriers=stages),
      'v_here': plgpu.Barrier(num_barriers=stages),
      'k_free': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      'v_free': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      'turn': plgpu.Barrier(num_arrivals=2),
    },
    across_warps=False,
  )(q, k, v, starts)


def _body(
  q: jax.Ref, k: jax.Ref, v: jax.Ref, starts: jax.Ref, out: jax.Ref,
  lse: jax.Ref, qs: jax.Ref, ks: jax.Ref, vs: jax.Ref, stat: jax.Ref,
  q_here: jax.Ref, k_here: jax.Ref, v_here: jax.Ref, k_free: jax.Ref,
  v_free: jax.Ref, turn: jax.Ref, *, keys: int, scale: float,
) -> None:  # fmt: skip
  """Computes the attention of 128 queries of one head."""
  b, h, m, w = causal_blocks.place(q.shape[1] // TILE)
  stages = KEPT // keys
  walk = causal_blocks.past_keys(starts, b, m, keys)

  def loading(source: jax.Ref, to: jax.Ref, here: jax.Ref) -> Callable:
    def load(i: jax.Array, stage: jax.Array) -> None:
      where = source.at[b, pl.ds(i * keys, keys), h]
      plgpu.copy_gmem_to_smem(where, to.at[stage], here.at[stage])

    return load

  streams = (
    (loading(k, ks, k_here), k_free),
    (loading(v, vs, v_here), v_free),
  )
  causal_blocks.fetch(walk, stages, streams)

  def attend(next_turn: Callable) -> None:
    top_row = m * TILE + w * ROWS
    rows = pl.ds(top_row, ROWS)
    causal_blocks.copy_parts(
      lambda columns: q.at[b, rows, h, columns], qs.at[w], q_here.at[w]
    )
    begin = compat.load(starts, (b, rows), BY_ROW, optimized=False)
    plgpu.barrier_wait(q_here.at[w])

    def step(i: jax.Array, carry: tuple) -> tuple:
      acc, top, total = carry
      stage = lax.rem(i, stages)

      def scores(ref: jax.Ref) -> jax.Array:
        own = [qs.at[w, i] for i in range(WIDE // PART)]
        causal_blocks.add_scores(ref, own, ks.at[stage])
        next_turn()
        return ref[...]

      # Scores: of the keys alone; the values may still be on their way.
      plgpu.barrier_wait(k_here.at[stage])
      s = pl.run_scoped(scores, causal_blocks.accumulator(keys))
      causal_blocks.release(k_free, i, walk, stages)
      # Softmax: online; a row lies in one warpgroup, nothing is exchanged.
      mask = lambda s: causal_blocks.masked(s, i * keys, top_row, begin)
      s = lax.cond(walk.needs_mask(i), mask, lambda s: s, s)
      new_top = jnp.maximum(top, s.max(axis=1) * scale)
      p = jnp.exp2(s * scale - wide(new_top, s.shape))
      shrink = jnp.exp2(top - new_top)
      total = total * shrink + p.sum(axis=1)
      # Values: the sum so far shrinks by as much as the maximum rose.
      acc = acc * wide(shrink, acc.shape)
      p = p.astype(jnp.bfloat16)
      # All of this in this turn, none of it in the next.
      acc, p, total, new_top = lax.optimization_barrier(
        (acc, p, total, new_top)
      )
      next_turn()
      plgpu.barrier_wait(v_here.at[stage])
      acc = compat.add_product(acc, p, vs.at[stage])
      causal_blocks.release(v_free, i, walk, stages)
      return acc, new_top, total

    # A first block may be masked for a query: its maximum must be finite. No
    # score is below this one.
    carry = (
      causal_blocks.zeros(VALUE),
      compat.full((ROWS,), LEAST, BY_ROW),
      compat.full((ROWS,), 0.0, BY_ROW),
    )
    acc, top, total = lax.fori_loop(walk.begin, walk.end, step, carry)
    pl.when(w == 0)(next_turn)  # the other one has called it once more
    # Store: the output, and the log-sum-exp for the backward pass.
    acc = acc / wide(total, acc.shape)
    stat[w] = top + jnp.log2(total)
    causal_blocks.store_parts(
      acc, qs.at[w], lambda columns: out.at[b, rows, h, columns]
    )
    plgpu.copy_smem_to_gmem(stat.at[w], lse.at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)

  causal_blocks.compute(attend, turn)
