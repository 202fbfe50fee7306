"""Latent attention of each query over the cached tokens chosen for it.

DeepSeek-V3.2 (arXiv:2512.02556, section 2.1): multi-head latent attention in
its absorbed form, where all heads of a query attend to the same K latents,
gathered by position; nothing of size [T S] exists, forward or backward.
Legend: B batch, T queries, S cached tokens, H heads, C latent, R rope dim,
K chosen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla import reference

__all__ = ['sparse_mla']


def sparse_mla(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  index: jax.Array,
  *,
  scale: float,
  impl: str | None = None,
) -> jax.Array:
  """Returns softmax(scale (q_c c[i] + q_r k_r[i])) c[i] over chosen i.

  Args:
    q_c: [B T H C] queries times k_up.
    q_r: [B T H R] rotary part of the queries.
    c: [B S C] latents.
    k_r: [B S R] shared rotary keys.
    index: [B T K] int32 positions i_j, as `indexer` gives them; one outside
      of 0..S-1 chooses nothing. A query that chose nothing gives 0.
    scale: of the scores.
    impl: None, 'reference' or 'gpu' (bfloat16, C=512, R=64).

  Returns:
    [B T H C] of q_c.dtype, differentiable in all but `index`. Scores, softmax
    and sums are float32; the kernel rounds probabilities to bfloat16. Gradients
    are the same bits in every run: each chosen latent's part is stored, and
    the parts of a latent are added in order of the queries.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  _check(q_c, q_r, c, k_r, index)

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.sparse_mla import gpu

    return gpu.sparse_mla(*args)

  # A position past a row's end would be one of the next row.
  index = jnp.asarray(index)
  index = jnp.where(index < c.shape[1], index.astype(jnp.int32), -1)
  args = (q_c, q_r, c, k_r, index, scale)
  functions = {'reference': reference.sparse_mla, 'gpu': gpu}
  return dispatch.run('sparse_mla', impl, functions, *args)


def _check(
  q_c: jax.Array, q_r: jax.Array, c: jax.Array, k_r: jax.Array, index: jax.Array
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  (B, T, H, C), (_, S, R) = q_c.shape, k_r.shape
  wanted = {
    'q_r': (q_r, (B, T, H, R)),
    'c': (c, (B, S, C)),
    'k_r': (k_r, (B, S, R)),
    'index': (index, (B, T, index.shape[-1])),
  }
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but q_c {list(q_c.shape)} and k_r '
        f'{list(k_r.shape)} ask for {list(shape)}'
      )
  if not jnp.issubdtype(index.dtype, jnp.integer):
    raise ValueError(f'index is {index.dtype}: give integer positions')
