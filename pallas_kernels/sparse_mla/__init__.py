"""Latent attention of each query over the cached tokens chosen for it.

DeepSeek-V3.2 (arXiv:2512.02556, section 2.1): multi-head latent attention in
its absorbed form, where all heads of a query attend to the same K latents,
gathered by position; nothing of size [T S] exists, forward or backward.
DeepSeek-V4 reads so, too: its one key-value head has no rotary part of its own,
queries choose of two lists (a window's tokens, compressed entries), and sinks
share the softmax.
Legend: B batch, T queries, S cached tokens, H heads, C latent, R rope dim,
K chosen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla import reference
from pallas_kernels.sparse_mla.keys import ChosenKeys, known

__all__ = ['ChosenKeys', 'attend', 'refused', 'shares', 'sparse_mla']


def sparse_mla(
  q_c: jax.Array,
  q_r: jax.Array | None,
  c: jax.Array,
  k_r: jax.Array | None,
  index: jax.Array,
  *,
  scale: float,
  impl: str | None = None,
) -> jax.Array:
  """Returns softmax(scale (q_c c[i] + q_r k_r[i])) c[i] over chosen i.

  Args:
    q_c: [B T H C] queries times k_up.
    q_r: [B T H R] rotary part of the queries; None as k_r is.
    c: [B S C] latents.
    k_r: [B S R] shared rotary keys, or None: scores are q_c c[i] alone.
    index: [B T K] int32 positions i_j, as `indexer` gives them; one outside
      of 0..S-1 chooses nothing. A query that chose nothing gives 0.
    scale: of the scores.
    impl: None, 'reference' or 'gpu' (bfloat16, C 512 or 256, R 64 or none).

  Returns:
    [B T H C] of q_c.dtype, differentiable in all but `index`. Scores, softmax
    and sums are float32; the kernel rounds probabilities to bfloat16, and for
    few queries partial sums, too. Gradients
    are the same bits in every run: each chosen latent's part is stored, and
    the parts of a latent are added in order of the queries.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  return attend(q_c, q_r, (ChosenKeys(c, k_r, index),), scale=scale, impl=impl)[
    0
  ]


def attend(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: tuple[ChosenKeys, ...],
  *,
  scale: float,
  sinks: jax.Array | None = None,
  impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes `sparse_mla` over one list of keys or two, with sinks.

  Args:
    q_c, q_r: see there.
    keys: one or two; all that a query chooses of either is in one softmax.
    scale: of the scores.
    sinks: [H], a score of each head that has no value; differentiable.
    impl: as there.

  Returns:
    [B T H C], and the log-sum-exp of the scaled scores and the sink [B T H]
    float32, -1e30 of none, which has no gradient.

  Raises:
    ValueError: shapes that don't fit each other, or another number of lists.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  _check(q_c, q_r, keys, sinks)

  def gpu(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.sparse_mla import gpu

    return gpu.sparse_mla(*args)

  args = (q_c, q_r, tuple(map(known, keys)), sinks, scale)
  functions = {'reference': reference.sparse_mla, 'gpu': gpu}
  out, log_sum = dispatch.run('sparse_mla', impl, functions, *args)
  return out, jax.lax.stop_gradient(log_sum)


def shares(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: ChosenKeys,
  log_sum: jax.Array,
  *,
  scale: float,
  impl: str | None = None,
) -> jax.Array:
  """Returns the mean over heads of the attention to each choice, [B T K].

  What the indexer learns to foresee (arXiv:2512.02556, section 2.1.1), float32
  and without gradient; 0 of no choice.

  Args:
    q_c, q_r: as of `attend`.
    keys: one of its lists.
    log_sum: [B T H], that it returned.
    scale: of the scores.
    impl: as there.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  _check(q_c, q_r, (keys,), None)
  if log_sum.shape != q_c.shape[:-1]:
    raise ValueError(
      f'log_sum is {list(log_sum.shape)}, but q_c {list(q_c.shape)} asks for'
      f' {list(q_c.shape[:-1])}'
    )

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.sparse_mla import gpu

    return gpu.shares(*args)

  args = jax.lax.stop_gradient((q_c, q_r, known(keys), log_sum))
  functions = {'reference': reference.shares, 'gpu': gpu}
  return dispatch.run('attention_shares', impl, functions, *args, scale)


def refused(
  impl: str, queries: jax.typing.DTypeLike, c: jax.Array, k_r: jax.Array | None
) -> str:
  """Returns why the kernel can't take latents, or ''.

  Args:
    impl: 'gpu' or 'tpu', which has none.
    queries: their dtype.
    c: [... S C] latents.
    k_r: [... S R] rotary keys, or None.
  """
  if impl != 'gpu':
    return dispatch.no_kernel(impl)
  from pallas_kernels.sparse_mla import gpu

  try:
    gpu.check_latents(jnp.dtype(queries), c, k_r)
  except NotImplementedError as error:
    return str(error)
  return ''


def _check(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: tuple[ChosenKeys, ...],
  sinks: jax.Array | None,
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  if len(keys) not in (1, 2):
    raise ValueError(f'keys are {len(keys)} lists, not one or two')
  B, T, H, C = q_c.shape
  if sinks is not None and sinks.shape != (H,):
    raise ValueError(f'sinks are {list(sinks.shape)}, not one for {H} heads')
  for c, k_r, index in keys:
    if (q_r is None) != (k_r is None):
      raise ValueError('q_r and k_r are arrays or None together')
    S = c.shape[1] if k_r is None else k_r.shape[1]
    wanted = {'c': (c, (B, S, C)), 'index': (index, (B, T, index.shape[-1]))}
    if k_r is not None:
      R = k_r.shape[-1]
      wanted |= {'q_r': (q_r, (B, T, H, R)), 'k_r': (k_r, (B, S, R))}
    for name, (array, shape) in wanted.items():
      if array.shape != shape:
        told = 'no k_r' if k_r is None else f'k_r {list(k_r.shape)}'
        raise ValueError(
          f'{name} is {list(array.shape)}, but q_c {list(q_c.shape)} and {told}'
          f' ask for {list(shape)}'
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
      raise ValueError(f'index is {index.dtype}: give integer positions')
