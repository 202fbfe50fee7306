"""Counts blocks of tokens from the start of each document.

Legend: B batch, T tokens, E blocks.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mla_prefill import segment_starts


def document_starts(
  segments: jax.Array | None, shape: tuple[int, int]
) -> jax.Array:
  """Returns for each token where its document begins, [B T] int32."""
  if segments is None:
    return jnp.zeros(shape, jnp.int32)
  return segment_starts(segments)


def block_starts(
  first: jax.Array,
  block: int,
  stride: int,
  begin: jax.Array | int = 0,
  size: int | None = None,
) -> jax.Array:
  """Returns the places where the complete blocks of a batch begin.

  Args:
    first: [B T] as `document_starts` gives it.
    block, stride: tokens of a block, and between two of them.
    begin: place of the first of these T tokens, in which the blocks end.
    size: E, T over the stride by default.

  Returns:
    [B E], -1 for none.
  """
  T = first.shape[1]
  # Beyond the end of its document's first block.
  grown = begin + jnp.arange(T) + 1 - first - block
  ends = (grown >= 0) & (grown % stride == 0)
  size = size or max(1, T // stride)
  pick = lambda row: jnp.nonzero(row, size=size, fill_value=-1)[0]
  ends = jax.vmap(pick)(ends)
  return jnp.where(ends < 0, -1, begin + ends - block + 1)
