"""What every layer may know of the tokens it works on.

Legend: B batch, T tokens.
"""

from typing import NamedTuple

import jax


class Context(NamedTuple):
  """The batch as layers see it; the flags are Python values, never traced."""

  tokens: jax.Array  # [B T] int32
  positions: jax.Array  # [B T] int32, from 0 within a document
  segments: jax.Array | None  # [B T] int32 document number; 0 = padding
  train: bool = False
  fresh: bool = True  # nothing is cached yet: these tokens see only each other
  rows: jax.Array | None = None  # [B T L K] int32, see layers/engram.py

  @property
  def valid(self) -> jax.Array | None:
    """[B T] bool, False on padding; None when there is none."""
    return None if self.segments is None else self.segments > 0
