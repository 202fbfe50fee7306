"""Steps of absorbed latent attention that its Hopper kernels share.

A thread block of mla_decode (bfloat16 or float8 latents) and of sparse_mla
holds 64 query rows in two warpgroups. Warpgroup w scores its own keys, the two
exchange row maxima and probabilities through shared memory, and w sums columns
[256 w, 256 w + 256) of the latents over all keys (bf16_latents: its own are
every second block; the steps of one block for both are here): a 64 x 512
float32 output fits the registers of no single warpgroup (the split is
FlashMLA's idea). The softmax is online, in base 2 (FlashAttention-2,
arXiv:2307.08691). Latents of sparse_mla may be 256 wide and lack a rotary part.
Legend: K keys that a warpgroup scores at once, h half of a latent's columns.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroups import meet, wide

ROWS, LATENT, ROPE = 64, 512, 64
HALF = LATENT // 2  # columns that a warpgroup sums
EMPTY = -1e30  # running maximum of a row that attends to no key yet
LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Running(NamedTuple):
  """Carries the online softmax of 64 rows from one block of keys to the next.

  Attributes:
    acc: [64 h] float32, this warpgroup's columns of the output so far.
    top: [64] float32, the largest score, in units of log 2.
    total: [64] float32, the sum of this warpgroup's probabilities.
  """

  acc: jax.Array
  top: jax.Array
  total: jax.Array


def check_dims(latent: int, rope: int) -> None:
  """Raises NotImplementedError unless the widths are 512 and 64."""
  if (latent, rope) != (LATENT, ROPE):
    raise NotImplementedError(
      f'latent {latent} and rope {rope}, not {LATENT} and {ROPE}'
    )


def load_queries(
  q_c: jax.Ref,
  q_r: jax.Ref | None,
  where: tuple,
  qc: jax.Ref,
  qr: jax.Ref | None,
  here: jax.Ref,
) -> None:
  """Starts the copies of a thread block's queries, from warpgroup 0.

  Args:
    q_c: [... 2h] bfloat16 in global memory.
    q_r: [... 64] bfloat16 in global memory, or None.
    where: index of the 64 rows in both.
    qc: [2 64 h] in shared memory, the two halves of the columns.
    qr: [64 64] in shared memory, or None.
    here: barrier of as many arrivals: three, or two without q_r.
  """
  half = qc.shape[-1]

  # One warpgroup asks, both wait for all copies.
  @pl.when(lax.axis_index('wg') == 0)
  def _():
    for i in range(2):
      plgpu.copy_gmem_to_smem(
        q_c.at[(*where, pl.ds(i * half, half))], qc.at[i], here
      )
    if q_r is not None:
      plgpu.copy_gmem_to_smem(q_r.at[where], qr, here)


def scores(
  qc: jax.Ref,
  qr: jax.Ref | None,
  latents: Callable[[jax.Array], jax.Ref],
  rope: jax.Ref | None,
  scale: float,
  keys: int | None = None,
) -> jax.Array:
  """Returns scale * (q_c c + q_r k_r) of this warpgroup's keys, [64 K] float32.

  Args:
    qc, qr: as in `load_queries`.
    latents: half i of the columns -> [K h] in shared memory.
    rope: [K 64] rotary keys in shared memory, or None.
    scale: multiplies the scores, LOG2E included.
    keys: K, which tells where there is no rope.
  """

  def products(ref: jax.Ref) -> jax.Array:
    # A loop, not two calls: unrolled, the descriptors spill (measured).
    def half(i: jax.Array, _) -> tuple:
      compat.wgmma(ref, qc.at[i], compat.transposed(latents(i)))
      return ()

    lax.fori_loop(0, 2, half, ())
    # The rotary part adds to the same accumulator.
    if qr is not None:
      compat.wgmma(ref, qr, compat.transposed(rope))
    return ref[...]

  acc = plgpu.ACC((ROWS, keys or rope.shape[0]), jnp.float32)
  return pl.run_scoped(products, acc) * scale


def mask_from(s: jax.Array, left: jax.Array) -> jax.Array:
  """Returns scores s [64 K] with columns left[row] and up at -inf."""
  key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA)
  return jnp.where(key < wide(left, s.shape), s, -jnp.inf)


def clear_from(latents: jax.Ref, left: jax.Array) -> None:
  """Zeros latents [64 h] in shared memory from row `left` on.

  Any bits lie there, and a probability of 0 times nan is nan.
  """
  keys, half = latents.shape

  def columns(j: jax.Array, _) -> tuple:
    at = slice(None), pl.ds(j * 64, 64)
    x = compat.load(latents, at, WGMMA)
    # By row: a number per entry would spill on jax 0.10.
    row = plgpu.broadcasted_iota(jnp.int32, (keys, 8), 0, layout=WGMMA)
    here = wide(left - row.max(axis=1), x.shape) > 0
    latents[at] = jnp.where(here, x, jnp.zeros_like(x))
    return ()

  lax.fori_loop(0, half // 64, columns, ())
  plgpu.commit_smem()


def start(half: int = HALF, sink: jax.Array | None = None) -> Running:
  """Returns the softmax of rows that attend to no key yet.

  Args:
    half: h.
    sink: [64] float32, in units of log 2: a score without a value.
  """
  acc = compat.full((ROWS, half), 0.0, WGMMA)
  if sink is None:
    top = compat.full((ROWS,), EMPTY, BY_ROW)
    return Running(acc, top, compat.full((ROWS,), 0.0, BY_ROW))
  # Of a sink's probability, 1 until a key is seen, each warpgroup sums half.
  return Running(acc, sink, compat.full((ROWS,), 0.5, BY_ROW))


def publish_max(s: jax.Array, stat: jax.Ref, barrier: jax.Ref) -> jax.Array:
  """Returns the row maxima of s [64 K] and shows them to the other warpgroup.

  Past it both warpgroups are done with the keys' rotary tiles.
  """
  # Scores are in: what they were read from may be overwritten.
  own = s.max(axis=1)
  stat[lax.axis_index('wg')] = own
  meet(barrier)
  return own


def softmax_step(
  s: jax.Array,
  own: jax.Array,
  running: Running,
  stat: jax.Ref,
  ps: jax.Ref,
  barrier: jax.Ref,
) -> tuple[jax.Array, Running]:
  """Stores the probabilities of a block and rescales the running sums.

  Args:
    s: [64 K] masked scores of this warpgroup.
    own: from `publish_max`.
    running: before the block.
    stat: [2 64] float32 in shared memory, the maxima of both warpgroups.
    ps: [2 64 K] bfloat16 in shared memory, where the probabilities of both lie
      afterwards.
    barrier: past it both warpgroups may read ps.

  Returns:
    shrink [64], what the output so far is multiplied by, and the state with
    `acc` as it was.
  """
  w = lax.axis_index('wg')
  # Both warpgroups need one maximum, or their sums would not add up.
  other = compat.load(stat, 1 - w, BY_ROW)
  top = jnp.maximum(running.top, jnp.maximum(own, other))
  p = jnp.exp2(s - wide(top, s.shape))
  shrink = jnp.exp2(running.top - top)
  total = running.total * shrink + p.sum(axis=1)
  # The products of the values take all keys: p of both crosses over.
  ps[w] = p.astype(jnp.bfloat16)
  plgpu.commit_smem()
  meet(barrier)
  return shrink, Running(running.acc, top, total)


def weigh(
  running: Running,
  shrink: jax.Array,
  ps: jax.Ref,
  latents: Callable[[int], jax.Ref],
) -> Running:
  """Returns the state with the output rescaled and the block's values added.

  Args:
    running, shrink: from `softmax_step`.
    ps: [2 64 K] bfloat16 probabilities in shared memory.
    latents: part i of the keys -> [K h] in shared memory, this warpgroup's
      columns.
  """
  acc = running.acc * wide(shrink, running.acc.shape)

  def run(ref: jax.Ref) -> None:
    # Refs indexed by numbers can't be closed over: they are made in here.
    for i in range(2):
      compat.wgmma(ref, ps.at[i], latents(i))
    plgpu.wgmma_wait(0)

  return running._replace(acc=compat.accumulate(acc, run))


def add(acc: jax.Array, *pairs: tuple[jax.Ref, jax.Ref]) -> jax.Array:
  """Returns acc + the sum of a @ b over pairs of refs in shared memory."""

  def run(ref: jax.Ref) -> None:
    for a, b in pairs:
      compat.wgmma(ref, a, b)
    plgpu.wgmma_wait(0)

  return compat.accumulate(acc, run)


def finish(
  running: Running,
  qc: jax.Ref,
  stat: jax.Ref,
  barriers: tuple[jax.Ref, jax.Ref],
  out: jax.Ref,
  lse: jax.Ref,
) -> None:
  """Divides by the sum of both warpgroups and stores output and log-sum-exp.

  A row that attends to no key gives 0 and EMPTY, or its sink.

  Args:
    running: after the last block.
    qc: [2 64 h] in shared memory, overwritten by the output.
    stat: [2 64] float32 in shared memory, overwritten.
    barriers: two, or one twice.
    out: [64 h] bfloat16 in global memory, this warpgroup's columns.
    lse: [64] float32 in global memory, base 2.
  """
  w = lax.axis_index('wg')
  # Each warpgroup summed the probabilities of its own keys alone.
  stat[w] = running.total
  meet(barriers[0])
  total = running.total + compat.load(stat, 1 - w, BY_ROW)
  # A row that attends to nothing has no sum to divide by.
  safe = jnp.where(total > 0, total, 1.0)
  # Store: through the tile of the queries, which nobody reads any more.
  qc[w] = (running.acc / wide(safe, running.acc.shape)).astype(jnp.bfloat16)
  meet(barriers[1])  # both have read the sums

  @pl.when(w == 0)
  def _():
    stat[0] = running.top + jnp.log2(safe)

  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(qc.at[w], out)
  pl.when(w == 0)(lambda: plgpu.copy_smem_to_gmem(stat.at[0], lse))
  plgpu.wait_smem_to_gmem(0)


def merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Combines splits by their log-sum-exp (base 2), in float32.

  Args:
    out: [B splits ... C], each split's attention alone.
    lse: [B splits ...] float32, EMPTY of a split that attends to nothing.

  Returns:
    [B ... C] of out.dtype and [B ...].
  """
  weights = jax.nn.softmax(lse * math.log(2.0), axis=1)
  # A split without tokens for a row has no weight, not an equal one.
  there = lse > EMPTY / 2
  weights = jnp.where(there, weights, 0)
  merged = (out.astype(jnp.float32) * weights[..., None]).sum(axis=1)
  top = lse.max(axis=1)
  total = jnp.where(there, jnp.exp2(lse - top[:, None]), 0).sum(axis=1)
  some = jnp.log2(jnp.maximum(total, 1.0))  # the greatest adds 1
  return merged.astype(out.dtype), top + some
