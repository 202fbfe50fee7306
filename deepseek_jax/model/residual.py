"""The plain residual stream: x + f(norm(x)).

A residual decides how a sublayer reads the stream and how its output goes
back, so that other streams (hyper-connections) are a matter of configuration.
Legend: B batch, T tokens, D model.
"""

import dataclasses

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
  """One stream, added to."""

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'Residual':
    """The connection of one sublayer."""
    del dim, std, rngs
    return Residual()

  def head(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'Residual':
    """What collapses the stream after the last block."""
    return self.build(dim, std=std, rngs=rngs)

  def expand(self, x: jax.Array) -> jax.Array:
    """Embedding [B T D] -> the stream that blocks pass on."""
    return x


class Residual(nnx.Module):
  """How one sublayer is connected to the stream."""

  def read(self, stream: jax.Array):
    """stream -> (the sublayer's input [B T D], what `write` needs to know)."""
    return stream, None

  def write(self, stream: jax.Array, y: jax.Array, how) -> jax.Array:
    """The stream after the sublayer's output y [B T D]."""
    del how
    return stream + y

  def collapse(self, stream: jax.Array) -> jax.Array:
    """The stream after the last block -> [B T D]."""
    return stream
