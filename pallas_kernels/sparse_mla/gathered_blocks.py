"""Sizes, tiles and steps that the kernels of sparse_mla share.

All of them gather chosen latents by cp.async, in tiles 64 bytes wide (see
gather).
Legend: N queries of all rows, K chosen, h half of a latent's columns.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather
from pallas_kernels.latent_blocks import ROPE, ROWS, WGMMA
from pallas_kernels.warpgroups import wide

HEADS = ROWS  # of one query, in a thread block
THIN = ROPE // 2  # rotary columns that a warpgroup sums
BLOCK, PART = 64, 32  # chosen latents, to a multiple of which K is padded


def memory(*shape: int) -> pl.MemoryRef:
  """Returns bfloat16 shared memory in the tiles that `gather` fills."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=gather.TILE)


def steps(at: jax.Array, size: int) -> jax.Array:
  """Returns the blocks of `size` up to the last choice in at [N K]: [N]."""
  place = jnp.arange(1, at.shape[1] + 1, dtype=jnp.int32)
  last = jnp.where(at >= 0, place, 0).max(axis=1)
  return -(-last // size)


def shared_pair() -> dict[str, pl.MemoryRef | plgpu.Barrier]:
  """Returns scratch in which the warpgroups exchange p and its gradient."""
  return {
    'ps': memory(HEADS, PART),
    'ds': memory(HEADS, PART),
    'p_here': plgpu.Barrier(),
    'met': plgpu.Barrier(num_arrivals=2),
  }


def product(*pairs: tuple[jax.Ref | None, jax.Ref | None]) -> jax.Array:
  """Returns the sum of a @ b.T over both halves of each pair, float32 [64 32].

  Args:
    *pairs: (a [2 64 n], b [2 32 n]) in shared memory; pairs of None are none.
  """

  def run(ref: jax.Ref) -> jax.Array:
    for a, b in pairs:
      if a is None:
        continue

      # A loop, not two calls: unrolled, the descriptors spill (measured).
      def half(i: jax.Array, _, a: jax.Ref = a, b: jax.Ref = b) -> tuple:
        compat.wgmma(ref, a.at[i], compat.transposed(b.at[i]))
        return ()

      lax.fori_loop(0, 2, half, ())
    return ref[...]

  return pl.run_scoped(run, plgpu.ACC((HEADS, PART), jnp.float32))


def mask_unchosen(s: jax.Array, chosen: jax.Array, axis: int) -> jax.Array:
  """Returns scores s with -inf where `chosen`, along axis, is negative."""
  return jnp.where(wide(chosen, s.shape, axis) >= 0, s, -jnp.inf)


def zeros(half: int, rope: bool) -> tuple[jax.Array, jax.Array | None]:
  """Returns zero sums of a warpgroup's latent and rotary columns."""
  zero = lambda columns: compat.full((HEADS, columns), 0.0, WGMMA)
  return zero(half), zero(THIN) if rope else None
