"""Lets warpgroups wait for each other, and spreads vectors over tiles."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax


def meet(barrier: jax.Ref) -> None:
  """Holds each warpgroup until all have arrived at the barrier."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def wide(values: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
  """Returns a vector broadcast to `shape`, where it lies along `axis`."""
  return lax.broadcast_in_dim(values, shape, [axis])
