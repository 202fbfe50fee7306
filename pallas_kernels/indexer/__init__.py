"""The lightning indexer: which cached tokens each query attends to.

score[t, s] = sum over heads of w[t, h] relu(q[t, h] k[s]), and the K best of
the tokens visible to t (DeepSeek-V3.2, arXiv:2512.02556, section 2.1). The
scores [T S] are stored for few queries alone.
Legend: B batch, T queries, S keys, H index heads, I index dim, K chosen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.indexer import reference

__all__ = ['indexer']


def indexer(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array | None = None,
  last: jax.Array | None = None,
  *,
  top_k: int,
  impl: str | None = None,
) -> jax.Array:
  """Returns the positions of the top_k best scores; lower ones win ties.

  Args:
    q: [B T H I] queries, rotated.
    k: [B S I] keys, rotated, one for all heads.
    w: [B T H] weights of the heads, with every constant factor in them.
    first, last: [B T] int32; query t may attend to positions
      first <= s < last that exist. None:
      0 and t + 1, causal with S = T.
    top_k: K.
    impl: None, 'reference' or 'gpu' (bfloat16 q and k, I=128, H a multiple
      of 8 up to 64, up to 2**20 keys).

  Returns:
    [B T K] int32 positions in ascending order; -1 behind the last one where
    fewer than K are seen. It has no gradient: the indexer learns from scores
    of its own on what was chosen.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  B, T = q.shape[:2]
  if first is None:
    first = jnp.zeros((B, T), jnp.int32)
  if last is None:
    last = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.int32), (B, T))
  _check(q, k, w, first, last, top_k)

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.indexer import gpu

    return gpu.indexer(*args)

  arrays = jax.lax.stop_gradient((q, k, w))
  # Before and behind the keys there is nothing to see, nor a place to write.
  first, last = (jnp.clip(a, 0, k.shape[1]) for a in (first, last))
  args = (*arrays, first, last, top_k)
  functions = {'reference': reference.indexer, 'gpu': gpu}
  return dispatch.run('indexer', impl, functions, *args)


def _check(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  top_k: int,
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  B, T, H, I = q.shape
  wanted = {
    'k': (k, (B, k.shape[1], I)),
    'w': (w, (B, T, H)),
    'first': (first, (B, T)),
    'last': (last, (B, T)),
  }
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but q {list(q.shape)} asks for '
        f'{list(shape)}'
      )
  if top_k < 1:
    raise ValueError(f'top_k={top_k}: must be at least 1')
