"""Chooses among the keys of a few blocks, which each query has of its own.

The second level of an indexer that looks at blocks first (HISA,
arXiv:2603.28458): score[t, s] = sum over heads of w[t, h] relu(q[t, h] k[s])
for the keys s of the blocks that were chosen for t, and the K best of those
that t may attend to. Neither gathered keys nor the scores of all queries are
stored.
Legend: B batch, T queries, S keys, H index heads, I index dim, N blocks of a
query, K chosen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.index_candidates import reference

__all__ = ['index_candidates']


def index_candidates(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  starts: jax.Array,
  last: jax.Array,
  *,
  size: int,
  top_k: int,
  impl: str | None = None,
) -> jax.Array:
  """Returns the positions of the top_k best scores; lower ones win ties.

  Args:
    q: [B T H I] queries, rotated.
    k: [B S I] keys, rotated, one for all heads.
    w: [B T H] weights of the heads, with every constant factor in them.
    starts: [B T N] int32, the position of the first key of each block, at any
      place; where it is none of the keys' there is no block. The others ascend,
      and blocks of a query have no key in common.
    last: [B T] int32; query t may attend to positions s < last.
    size: keys of a block, of which the last may be missing.
    top_k: K.
    impl: None, 'reference' or 'gpu' (bfloat16 q and k, I=128, H a multiple of
      8 up to 64, blocks of 8, 16, 32 or a multiple of 64 keys).

  Returns:
    [B T K] int32 positions in ascending order; -1 behind the last one where
    fewer than K are seen. It has no gradient, as `indexer` has none.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  _check(q, k, w, starts, last)
  for name, value in (('size', size), ('top_k', top_k)):
    if value < 1:
      raise ValueError(f'{name}={value}: must be at least 1')

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.index_candidates import gpu

    return gpu.index_candidates(*args)

  S = k.shape[1]
  # Where no key is there is no block, nor a query's last key.
  inside = (starts >= 0) & (starts < S)
  starts = jnp.where(inside, starts, -1).astype(jnp.int32)
  last = jnp.clip(last, 0, S).astype(jnp.int32)
  args = (*jax.lax.stop_gradient((q, k, w)), starts, last, size, top_k)
  functions = {'reference': reference.index_candidates, 'gpu': gpu}
  return dispatch.run('index_candidates', impl, functions, *args)


def _check(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  starts: jax.Array,
  last: jax.Array,
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  B, T, H, I = q.shape
  wanted = {
    'k': (k, (B, k.shape[1], I)),
    'w': (w, (B, T, H)),
    'starts': (starts, (B, T, starts.shape[-1])),
    'last': (last, (B, T)),
  }
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but q {list(q.shape)} asks for '
        f'{list(shape)}'
      )
