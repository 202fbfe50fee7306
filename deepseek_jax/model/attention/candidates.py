"""Finds the best of many scores on a CPU, in two levels, exactly.

The k greatest of S scores lie in the k groups whose own greatest are the
greatest: a group that is not among these has k scores before any of its own.
So S / g maxima and k g candidates are looked through instead of S scores, about
2 sqrt(S k) with the best g; each look has a cost of its own, so that this pays
for S far beyond k. A look counts what reaches a limit, bit by bit of the limit,
where jax.lax.top_k keeps a heap. Scores are made a chunk of keys at a time,
which stays in the cache, and only as far as a block's last query sees.
Legend: N rows, S scores, g of a group, k wanted, B batch, n queries of a block,
C keys of a chunk.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention.query_blocks import rows
from pallas_kernels.indexer import bits
from pallas_kernels.ordered import NOTHING, ordered

CHUNK = 2048  # keys whose scores of a block of queries stay in a core's cache
_FEW = 1024  # wanted of all rows, for which a heap is faster than counts


def group_size(scores: int, k: int) -> int:
  """Returns g, a power of two near sqrt(S / k); 1 where one level is best."""
  if scores < 16 * k:
    return 1
  return 1 << round(math.log2(scores / k) / 2)


def best(scores: jax.Array, k: int) -> jax.Array:
  """Returns the places of the k greatest of scores [N S] float32: [N k] int32.

  They ascend, with -1 behind the last; -inf and nan are no scores. Of equal
  ones the lowest places are taken.
  """
  scores = _real(scores)
  N, S = scores.shape
  size = group_size(S, k)
  if size == 1:
    return _of_all(scores, k)
  scores = jnp.pad(scores, ((0, 0), (0, -S % size)), constant_values=-jnp.inf)
  tops = scores.reshape(N, -1, size).max(axis=-1)
  return of_groups(scores, tops, k)


def _real(scores: jax.Array) -> jax.Array:
  """Returns scores with -inf for nan, which would be any maximum."""
  return jnp.where(scores > -jnp.inf, scores, -jnp.inf)


def _of_all(scores: jax.Array, k: int) -> jax.Array:
  """Computes `best` in one level."""
  if scores.shape[0] * k < _FEW:
    return by_heap(scores, k)
  scores = jnp.pad(
    scores, ((0, 0), (0, -scores.shape[1] % 32)), constant_values=-jnp.inf
  )
  integers = jnp.where(scores > -jnp.inf, ordered(scores), NOTHING)
  return bits.positions(bits.best(integers, k), k)


def by_heap(scores: jax.Array, k: int) -> jax.Array:
  """Computes `best` by jax.lax.top_k."""
  value, at = jax.lax.top_k(_real(scores), k)
  none = scores.shape[1]
  at = jnp.sort(jnp.where(value > -jnp.inf, at, none), axis=-1)
  return jnp.where(at < none, at, -1)


def of_groups(scores: jax.Array, tops: jax.Array, k: int) -> jax.Array:
  """Computes `best` in two levels.

  Args:
    scores: [N S].
    tops: [N S/g], the greatest of each group of neighbours.
    k: at most S / g.
  """
  N, S = scores.shape
  size = S // tops.shape[1]
  # In order of places, so that of equal candidates the lowest is the first.
  groups = _of_all(tops, k)
  some = rows(scores.reshape(N, -1, size), groups)  # [N k g]
  some = jnp.where(groups[..., None] >= 0, some, -jnp.inf)
  at = _of_all(some.reshape(N, -1), k)
  group = jnp.take_along_axis(groups, jnp.maximum(at, 0) // size, axis=-1)
  return jnp.where(at >= 0, group * size + at % size, -1)


def by_chunks(
  score: Callable[[jax.Array, Any], jax.Array],
  keys: Any,
  shape: tuple[int, int],
  last: jax.Array,
  k: int,
) -> jax.Array:
  """Returns the places of the k greatest scores of each query: [B n k].

  As `best` returns them.

  Args:
    score: (places [C], keys of these [B C ...]) -> scores [B n C], -inf where a
      query does not see a key.
    keys: tree of [B S ...], S a multiple of CHUNK.
    shape: B and n.
    last: [] int32, the last place that any query sees; later ones are not
      scored.
    k: at most S.
  """
  S = jax.tree.leaves(keys)[0].shape[1]
  size = min(group_size(S, k), CHUNK)
  scores = jnp.full((*shape, S), -jnp.inf, jnp.float32)
  tops = jnp.full((*shape, S // size), -jnp.inf, jnp.float32)

  def chunk(i: jax.Array, made: tuple) -> tuple:
    scores, tops = made
    at = i * CHUNK
    part = lambda a: jax.lax.dynamic_slice_in_dim(a, at, CHUNK, axis=1)
    new = _real(score(at + jnp.arange(CHUNK), jax.tree.map(part, keys)))
    most = new.reshape(*shape, -1, size).max(axis=-1)
    put = jax.lax.dynamic_update_slice_in_dim
    return put(scores, new, at, 2), put(tops, most, at // size, 2)

  count = jnp.minimum(last // CHUNK + 1, S // CHUNK)
  scores, tops = jax.lax.fori_loop(0, count, chunk, (scores, tops))
  scores, tops = scores.reshape(-1, S), tops.reshape(-1, S // size)
  found = _of_all(scores, k) if size == 1 else of_groups(scores, tops, k)
  return found.reshape(*shape, k)
