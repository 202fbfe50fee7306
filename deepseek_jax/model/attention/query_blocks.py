"""Computes queries a block at a time, and which keys each may attend to.

A query of sparse attention has scores, indices and gathered keys of its own;
in blocks, memory holds them for a few queries, forwards and backwards.
Legend: B batch, T queries, S keys, n queries of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model import lookup

# Numbers that a block may make per array: 256 MiB of float32.
_MOST = 1 << 26


class Visibility(NamedTuple):
  """Holds what queries attend to: keys up to their place, in their segment."""

  places: jax.Array  # [B T] int32, the query's own place among the keys
  segments: jax.Array | None = None  # [B T]; None: all keys are of one

  def mask(
    self, keys: jax.Array, key_segments: jax.Array | None = None
  ) -> jax.Array:
    """Returns the visible keys; `keys` are places [S], or per query [B T K]."""
    seen = keys <= self.places[..., None]
    if self.segments is None:
      return seen
    if keys.ndim == 1:
      return seen & (self.segments[..., None] == key_segments[:, None])
    theirs = rows(key_segments, keys)
    return seen & (self.segments[..., None] == theirs)


def visibility(
  positions: jax.Array, segments: jax.Array | None, fresh: bool
) -> Visibility:
  """Returns the visibility of tokens among themselves when `fresh`.

  Else that of a cache, by position.
  """
  if not fresh:
    return Visibility(positions)
  places = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)
  return Visibility(places, segments)


def rows(keys: jax.Array, chosen: jax.Array) -> jax.Array:
  """Returns keys [B S ...] at chosen [B ...]: [B ... ...]; -1 gives any row."""
  pick = lambda one, at: lookup.rows(one, at, 'promise_in_bounds')
  return jax.vmap(pick)(keys, jnp.maximum(chosen, 0))


def over_blocks(
  f: Callable[..., Any],
  queries: Any,
  most: int,
  numbers: int = 1,
  shared: tuple = (),
) -> Any:
  """Computes f of every block of queries, put together again.

  The backward pass recomputes a block, and sums as `each` does.

  Args:
    f: (block of `queries` [B n ...], *shared) -> tree of [B n ...].
    queries: tree of [B T ...].
    most: queries of a block.
    numbers: what f makes per query and row of the batch; bounds a block too.
    shared: trees of arrays that every block takes whole.
  """
  B, T = jax.tree.leaves(queries)[0].shape[:2]
  count = -(-T // max(1, min(most, _MOST // (B * numbers))))
  if count == 1:
    return f(queries, *shared)
  size = -(-T // count)

  def split(a: jax.Array) -> jax.Array:
    rest = [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, [(0, 0), (0, size * count - T), *rest])
    return jnp.moveaxis(a.reshape(B, count, size, *a.shape[2:]), 1, 0)

  def join(a: jax.Array) -> jax.Array:
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(B, count * size, *a.shape[3:])[:, :T]

  # The last block is filled up with zeros, which `join` cuts off again.
  blocks = jax.tree.map(split, queries)
  return jax.tree.map(join, each(f, blocks, shared))


def each(f: Callable[..., Any], blocks: Any, shared: tuple) -> Any:
  """Returns f of each of blocks [count ...], stacked.

  The backward pass recomputes a block instead of keeping what it made. What
  blocks share gets the sum of their gradients, in float32 whatever it is itself
  (in bfloat16 a sum over thousands of blocks would stand still); then
  derivatives are first ones only.

  Args:
    f: (block, *shared) -> tree. Arrays reach it by its arguments alone.
    blocks: tree of [count ...].
    shared: trees of arrays that every block takes whole.
  """
  if any(map(lookup.short, jax.tree.leaves(shared))):
    return _each(f, blocks, shared)
  return jax.lax.map(jax.checkpoint(lambda block: f(block, *shared)), blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(f: Callable[..., Any], blocks: Any, shared: tuple) -> Any:
  """Computes `each` with gradients of `shared` that are summed in float32."""
  return jax.lax.map(lambda block: f(block, *shared), blocks)


def _each_fwd(
  f: Callable[..., Any], blocks: Any, shared: tuple
) -> tuple[Any, tuple]:
  """Saves the inputs alone: blocks are recomputed."""
  return _each(f, blocks, shared), (blocks, shared)


def _each_bwd(
  f: Callable[..., Any], saved: tuple, grad: Any
) -> tuple[Any, tuple]:
  """Recomputes each block, and adds up the gradients of `shared`."""
  blocks, shared = saved
  real = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.inexact)
  # What is no real number has no gradient: None stands in its place.
  only = lambda like, g: g if real(like) else None

  def one(totals: Any, block_grad: tuple) -> tuple[Any, Any]:
    block, grad = block_grad
    _, pull = jax.vjp(f, block, *shared)
    own, *theirs = pull(grad)
    more = jax.tree.map(only, shared, tuple(theirs))
    add = lambda total, g: total + g.astype(jnp.float32)
    return jax.tree.map(add, totals, more), jax.tree.map(only, block, own)

  zeros = lambda a: jnp.zeros(a.shape, jnp.float32) if real(a) else None
  totals, own = jax.lax.scan(one, jax.tree.map(zeros, shared), (blocks, grad))
  as_was = lambda like, g: g.astype(like.dtype) if real(like) else None
  return own, jax.tree.map(as_was, shared, totals)


_each.defvjp(_each_fwd, _each_bwd)
