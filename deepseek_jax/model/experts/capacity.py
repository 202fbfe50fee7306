"""Drops the choices of experts beyond a device's budget (V2).

Legend: B batch, T tokens, E experts, K chosen, N choices of a sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import above, at_least, within
from deepseek_jax.model.experts.router import Routing


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
  """Describes V2's token dropping: a device takes `factor` times its mean load.

  The budget is a sequence's: of the N choices that its tokens make, a device
  takes factor * N / devices, those of highest affinity. The paper's budget is
  that of a device over all that it computes at a time, so micro-batches and
  meshes would change what is dropped, and the loss. A sequence's changes with
  neither, and drops what other sequences would have left room for.

  Attributes:
    factor: budget of a device, in a sequence's average loads.
    devices: device groups of neighbouring experts; the same on any mesh.
    exempt: share of the sequences that lose nothing: by a hash of their
      tokens, so the same ones whatever batch or device they are in.
  """

  factor: float = 1.0
  devices: int = 1
  exempt: float = 0.1

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    above(self, 'capacity.', factor=0)
    at_least(self, 'capacity.', devices=1)
    within(self, 'capacity.', exempt=(0, 1))


def exempted(tokens: jax.Array, share: float) -> jax.Array:
  """Returns which sequences lose no token: [B] bool, true for `share` of all.

  Tokens count in any order, so that the shifted ones of multi-token prediction
  exempt the same sequences.

  Args:
    tokens: [B T] int32.
    share: 0..1.
  """
  # Integers: the sum over a sharded sequence comes out the same.
  h = _mixed(tokens.astype(jnp.uint32) + jnp.uint32(1)).sum(
    axis=1, dtype=jnp.uint32
  )
  return (_mixed(h) >> jnp.uint32(8)).astype(jnp.float32) * 2.0**-24 < share


def _mixed(h: jax.Array) -> jax.Array:
  """Applies murmur's last step: a bijection of uint32 that looks random."""
  u32 = jnp.uint32
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    h = (h ^ (h >> u32(shift))) * u32(factor)
  return h


def drop(
  routing: Routing, experts: int, cfg: CapacityConfig, exempt: jax.Array
) -> tuple[Routing, jax.Array]:
  """Drops the lowest affinities of what is over a sequence's budget.

  Of equal affinities the later token's is dropped first. Sequences are
  independent of each other.

  Args:
    routing: of all choices.
    experts: E.
    cfg: what a device takes.
    exempt: [B] bool, sequences that lose nothing.

  Returns:
    The routing with dropped choices sent nowhere (expert E, weight 0), and
    their number, int32.
  """
  B, T, K = routing.experts.shape
  chosen = routing.experts.reshape(B, T * K)
  device = chosen // (experts // cfg.devices)  # `devices` for padding
  # By device, and on it by falling affinity; lexsort is stable.
  order = jnp.lexsort((-routing.weights.reshape(B, T * K), device))
  counts = (device[..., None] == jnp.arange(cfg.devices)).sum(axis=1)
  start = jnp.cumsum(counts, axis=1) - counts  # of each device in the order
  # One more device, that of padding.
  start = jnp.pad(start, [(0, 0), (0, 1)])
  place = jnp.argsort(order, axis=1)  # of each choice in the order
  rank = place - jnp.take_along_axis(start, device, axis=1)
  # Padding chooses no device, so counts.sum is the N of the sequence.
  budget = cfg.factor * counts.sum(axis=1) / cfg.devices
  dropped = (rank >= budget[:, None]) & (chosen < experts) & ~exempt[:, None]
  kept = ~dropped.reshape(B, T, K)
  return (
    routing._replace(
      experts=jnp.where(kept, routing.experts, experts),
      weights=jnp.where(kept, routing.weights, 0.0),
    ),
    dropped.sum(),
  )
