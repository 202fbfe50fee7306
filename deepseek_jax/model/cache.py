"""Holds the decoding state: what each layer caches of the tokens before.

Each slot of a preallocated buffer is a position: token p of a row lies at
slot p. So causality alone (slot <= position) hides slots that are still
empty, and rows of different length share one buffer.
Legend: B batch, S slots, T new tokens, N longest n-gram.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.context import Context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Holds the caches of all layers.

  `fresh` is static, and true while no token has been written.
  """

  layers: Any  # per segment, per block of its pattern: stacked [repeat B S ...]
  length: jax.Array  # [B] int32, tokens written per row
  slots: int = dataclasses.field(metadata={'static': True})
  fresh: bool = dataclasses.field(default=True, metadata={'static': True})
  # [B N+spare], a ring of what hashing the last tokens needs; None if a caller
  # gives these to `apply`.
  recent: jax.Array | None = None

  def after(
    self, ctx: Context, layers: tuple, recent: jax.Array | None
  ) -> 'Cache':
    """Returns the cache with tokens written, and what layers made of them."""
    end = ctx.positions + 1
    if ctx.valid is None:
      length = end.max(axis=1)
    else:
      # Padding takes no slot; a row of padding stays where it is.
      end = jnp.where(ctx.valid, end, 0).max(axis=1)
      length = jnp.where(ctx.valid.any(axis=1), end, self.length)
    return Cache(layers, length, self.slots, False, recent)

  def rewound(self, length: jax.Array) -> 'Cache':
    """Returns the cache of which rows go on after `length` [B] tokens.

    What lies beyond is overwritten before it is read. By more tokens than the
    `spare` that the cache was made with only a cache without rings is rewound.
    """
    length = jnp.asarray(length, jnp.int32)
    return dataclasses.replace(self, length=length, fresh=False)


def write(
  buffer: jax.Array,
  new: jax.Array,
  positions: jax.Array,
  valid: jax.Array | None = None,
) -> jax.Array:
  """Puts new [B T ...] into buffer [B S ...] at positions [B T].

  Tokens that aren't `valid` [B T], or lie past the last slot, are not written.
  """
  slots = positions
  if valid is not None:
    # One slot beyond the buffer, where mode='drop' writes nothing.
    slots = jnp.where(valid, positions, buffer.shape[1])
  rows = jnp.arange(buffer.shape[0])[:, None]
  put = lambda b, slots, new: b.at[rows, slots].set(new, mode='drop')
  new = new.astype(buffer.dtype)
  return put_in(put, buffer, slots, new, slots=buffer.shape[1])


def put_in(
  put: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  buffer: jax.Array,
  at: jax.Array,
  new: jax.Array,
  *,
  slots: int,
) -> jax.Array:
  """Returns put(buffer, at, new), which a CPU does once and in place.

  A write to a single slot XLA:CPU joins with each operation that reads the
  buffer afterwards, and copies the buffer for each of them, at every token that
  is decoded. What lies in a branch is joined with nothing.

  Args:
    put: writes; drops what lies beyond the slots.
    buffer: any shape.
    at: slots, any shape.
    new: what they get.
    slots: how many there are.
  """
  if at.size != 1:
    return put(buffer, at, new)
  keep = lambda buffer, at, new: buffer
  in_branch = functools.partial(jax.lax.cond, at.reshape(()) < slots, put, keep)
  return jax.lax.platform_dependent(buffer, at, new, cpu=in_branch, default=put)
