"""Counts blocks of tokens from the start of each document.

Legend: B batch, T tokens, E blocks.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model.context import Context
from pallas_kernels.mla_prefill import segment_starts


def new_tokens(ctx: Context) -> tuple[jax.Array, jax.Array]:
  """Returns where the tokens that a call caches begin and end, [B 1] each.

  Padding may stand before them or behind; a row without any is 0, 0.
  """
  if ctx.valid is None:
    return ctx.positions[:, :1], ctx.positions[:, -1:] + 1
  of = lambda other: jnp.where(ctx.valid, ctx.positions, other)
  end = of(-1).max(axis=1, keepdims=True) + 1
  first = of(jnp.iinfo(jnp.int32).max).min(axis=1, keepdims=True)
  return jnp.minimum(first, end), end


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
