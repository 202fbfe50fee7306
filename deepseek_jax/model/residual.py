"""Holds the plain residual stream: x + f(norm(x)).

A residual decides how a sublayer reads the stream and how its output goes
back, so that other streams (hyper-connections) are a matter of configuration.
Legend: B batch, T tokens, D model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
  """Describes one stream, to which every sublayer adds its output."""

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'Residual':
    """Returns the connection of one sublayer."""
    del dim, std, rngs
    return Residual()

  def head(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'Residual':
    """Returns the module that collapses the stream after the last block."""
    return self.build(dim, std=std, rngs=rngs)

  def expand(self, x: jax.Array) -> jax.Array:
    """Returns the stream that blocks pass on, from the embedding [B T D]."""
    return x


class Residual(nnx.Module):
  """Connects one sublayer to the stream."""

  def read(self, stream: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the sublayer's input [B T D], and what `write` needs."""
    return stream, None

  def read_normed(
    self, stream: jax.Array, norm: Callable
  ) -> tuple[jax.Array, Any]:
    """Returns norm of the sublayer's input [B T D], and what `write` needs."""
    x, how = self.read(stream)
    return norm(x), how

  def write(self, stream: jax.Array, y: jax.Array, how: Any) -> jax.Array:
    """Returns the stream after the sublayer's output y [B T D]."""
    del how
    return stream + y

  def collapse(self, stream: jax.Array) -> jax.Array:
    """Returns the stream after the last block as [B T D]."""
    return stream

  def collapse_normed(self, stream: jax.Array, norm: Callable) -> jax.Array:
    """Returns norm of what `collapse` returns."""
    return norm(self.collapse(stream))
