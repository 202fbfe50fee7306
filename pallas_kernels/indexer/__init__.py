"""The lightning indexer: which cached tokens each query attends to.

score[t, s] = sum over heads of w[t, h] relu(q[t, h] k[s]), and the K best of
the tokens visible to t (DeepSeek-V3.2, arXiv:2512.02556, section 2.1). The
scores [T S] are stored for few queries alone. Queries and keys may be float8
with a scale per vector of I, as DeepSeek runs it: a query's scale is part of
w, and a key's multiplies the sum over heads.
Legend: B batch, T queries, S keys, H index heads, I index dim, K chosen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.indexer import reference
from pallas_kernels.quantize.reference import FP8

__all__ = ['indexer']


def indexer(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array | None = None,
  last: jax.Array | None = None,
  *,
  top_k: int,
  q_scale: jax.Array | None = None,
  k_scale: jax.Array | None = None,
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
    q_scale: [B T H] float32 of queries in float8_e4m3fn; None of others.
    k_scale: [B S] float32 of keys in float8_e4m3fn; None of others.
    impl: None, 'reference' or 'gpu' (q and k both bfloat16 or both float8,
      I=128, H a multiple of 8 up to 64, up to 2**20 keys).

  Returns:
    [B T K] int32 positions in ascending order; -1 behind the last one where
    fewer than K are seen. It has no gradient: the indexer learns from scores
    of its own on what was chosen.

  Raises:
    ValueError: shapes that don't fit each other, float8 without a scale, or a
      scale of other numbers.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  B, T = q.shape[:2]
  if first is None:
    first = jnp.zeros((B, T), jnp.int32)
  if last is None:
    last = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.int32), (B, T))
  _check(q, k, w, first, last, top_k)
  _check_scale('q', q, q_scale, w.shape)
  _check_scale('k', k, k_scale, k.shape[:2])

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.indexer import gpu

    return gpu.indexer(*args)

  if q_scale is not None:
    w = w.astype(jnp.float32) * q_scale
  q, k, w, k_scale = jax.lax.stop_gradient((q, k, w, k_scale))
  # Before and behind the keys there is nothing to see, nor a place to write.
  first, last = (jnp.clip(a, 0, k.shape[1]) for a in (first, last))
  args = (q, k, w, first, last, top_k, k_scale)
  functions = {'reference': reference.indexer, 'gpu': gpu}
  return dispatch.run('indexer', impl, functions, *args)


def _check_scale(
  name: str, codes: jax.Array, scale: jax.Array | None, shape: tuple[int, ...]
) -> None:
  """Raises ValueError unless float8 has a scale [*shape], others none."""
  if (codes.dtype == FP8) != (scale is not None):
    given = 'no scale' if scale is None else 'a scale'
    raise ValueError(
      f'{name} is {codes.dtype} with {given}: float8_e4m3fn takes'
      f' {name}_scale {list(shape)}, others take None'
    )
  if scale is not None and scale.shape != shape:
    raise ValueError(
      f'{name}_scale is {list(scale.shape)}, but {name} {list(codes.shape)}'
      f' asks for {list(shape)}'
    )


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
