"""What the kernels of sparse_mla share: sizes, layouts and small helpers."""

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, gather

HEADS, LATENT, ROPE = 64, 512, 64
HALF, THIN = LATENT // 2, ROPE // 2  # columns of a warpgroup
BLOCK, PART = 64, 32  # chosen latents, to a multiple of which K is padded
LOG2E = math.log2(math.e)
EMPTY = -1e30  # running maximum of a head that has seen no key yet
WGMMA = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def memory(*shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=gather.TILE)


def wide(values, shape, axis=0):
  return lax.broadcast_in_dim(values, shape, [axis])


def meet(barrier):
  """Both warpgroups get here before either goes on."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def steps(at, size):
  """[N] int32: blocks of each query up to its last choice."""
  place = jnp.arange(1, at.shape[1] + 1, dtype=jnp.int32)
  last = jnp.where(at >= 0, place, 0).max(axis=1)
  return -(-last // size)


def shared_pair():
  """Probabilities and their gradients, between the two warpgroups."""
  return {
    'ps': memory(HEADS, PART),
    'ds': memory(HEADS, PART),
    'p_here': plgpu.Barrier(),
    'met': plgpu.Barrier(num_arrivals=2),
  }


def product(*pairs):
  """Sum of a @ b.T of both halves of each pair, float32 [64, 32]."""

  def run(ref):
    for a, b in pairs:
      # A loop, not two calls: unrolled, the descriptors spill (measured).
      def half(i, _, a=a, b=b):
        compat.wgmma(ref, a.at[i], compat.transposed(b.at[i]))
        return ()

      lax.fori_loop(0, 2, half, ())
    return ref[...]

  return pl.run_scoped(run, plgpu.ACC((HEADS, PART), jnp.float32))


def add(acc, *pairs):
  """acc + sum of a @ b of each pair."""

  def run(ref):
    for a, b in pairs:
      compat.wgmma(ref, a, b)
    plgpu.wgmma_wait(0)

  return compat.accumulate(acc, run)


def zeros():
  """Sums of a warpgroup's columns of latent and rotary key."""
  return (
    compat.full((HEADS, HALF), 0.0, WGMMA),
    compat.full((HEADS, THIN), 0.0, WGMMA),
  )
