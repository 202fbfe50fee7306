"""Grouped-query attention of each query to the tokens chosen for its group.

What the branches of native sparse attention read (arXiv:2502.11089): rows of
selected blocks, of a window or of compressed entries, one choice for all heads
of a group. Nothing of size [T S] exists, forward or backward.
Legend: B batch, T queries, S tokens, G groups, J heads of a group, K query/key
dim, V value dim, M chosen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sparse_gqa import reference

__all__ = ['sparse_gqa']


def sparse_gqa(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  index: jax.Array,
  *,
  scale: float,
  impl: str | None = None,
) -> jax.Array:
  """Returns softmax(scale q k[i]) v[i] over the rows i chosen by each group.

  Args:
    q: [B T G J K] queries.
    k: [B S G K] keys.
    v: [B S G V] values.
    index: [B T G M] int32 positions; one outside of 0..S-1 chooses nothing. A
      query that chose nothing gives 0.
    scale: of the scores.
    impl: None, 'reference' or 'gpu' (bfloat16, K + V up to 576: it is
      sparse_mla's kernel, for a key and its value lie side by side in a row).

  Returns:
    [B T G J V] of q.dtype, differentiable in all but `index`. Scores, softmax
    and sums are float32; the kernel rounds probabilities to bfloat16,
    and for few queries partial sums, too.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  _check(q, k, v, index)

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.sparse_gqa import gpu

    return gpu.sparse_gqa(*args)

  index = jnp.asarray(index)
  here = (index >= 0) & (index < k.shape[1])
  index = jnp.where(here, index.astype(jnp.int32), -1)
  functions = {'reference': reference.sparse_gqa, 'gpu': gpu}
  return dispatch.run('sparse_gqa', impl, functions, q, k, v, index, scale)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  (B, T, G, _, K), S = q.shape, k.shape[1]
  wanted = {
    'k': (k, (B, S, G, K)),
    'v': (v, (B, S, G, v.shape[-1])),
    'index': (index, (B, T, G, index.shape[-1])),
  }
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but q {list(q.shape)} and k'
        f' {list(k.shape)} ask for {list(shape)}'
      )
  if not jnp.issubdtype(index.dtype, jnp.integer):
    raise ValueError(f'index is {index.dtype}: give integer positions')
