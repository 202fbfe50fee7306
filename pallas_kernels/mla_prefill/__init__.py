"""Causal attention with keys wider than values, within packed segments.

DeepSeek-V2 (arXiv:2405.04434, section 2.1) in its expanded form, as used for
training and prefill: 192 = 128 + 64 query and key dims, 128 value dims.
Legend: B batch, T tokens, H heads, D query and key dims, V value dims.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.mla_prefill import reference

__all__ = ['mla_prefill', 'segment_starts']


def segment_starts(segments: jax.Array) -> jax.Array:
  """Returns where each token's segment starts, int32 [B T].

  A segment is a run of equal numbers in segments [B T] int32: the same number
  further on is another.
  """
  at = jnp.arange(segments.shape[1], dtype=jnp.int32)
  changes = segments[:, 1:] != segments[:, :-1]
  firsts = jnp.pad(jnp.where(changes, at[1:], 0), ((0, 0), (1, 0)))
  return jax.lax.cummax(firsts, axis=1)


def mla_prefill(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None = None,
  *,
  scale: float,
  impl: str | None = None,
) -> jax.Array:
  """Returns softmax(scale q[t] k[s]) v[s] over s <= t of the same segment.

  Args:
    q: [B T H D] queries.
    k: [B T H D] keys, the shared rotary part repeated for every head.
    v: [B T H V] values.
    segments: [B T] int32 or None; tokens attend to their own run of equal
      numbers.
    scale: of the scores.
    impl: None, 'reference', 'gpu' (bfloat16, D=192, V=128), or 'cudnn' where
      it can (a Hopper GPU, no segments), else as None with the reason logged.

  Returns:
    [B T H V] of q.dtype, differentiable in q, k and v. Scores, softmax and
    sums are float32; the kernel rounds probabilities to bfloat16.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  B, T, H, _ = q.shape
  if k.shape != q.shape or v.shape[:3] != (B, T, H):
    raise ValueError(
      f'q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} differ '
      'in B T H, or q and k in D'
    )
  if segments is None:
    starts = jnp.zeros((B, T), jnp.int32)
  elif segments.shape != (B, T):
    raise ValueError(f'segments are {list(segments.shape)}, not {[B, T]}')
  else:
    starts = segment_starts(jnp.asarray(segments))

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.mla_prefill import gpu

    return gpu.mla_prefill(*args)

  def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, _, scale: float
  ) -> jax.Array:
    from pallas_kernels.mla_prefill import cudnn

    return cudnn.mla_prefill(q, k, v, segments, scale)

  args = (q, k, v, starts, scale)
  functions = {'reference': reference.mla_prefill, 'gpu': gpu, 'cudnn': cudnn}
  if impl == 'cudnn':
    try:
      return dispatch.run('mla_prefill', impl, functions, *args)
    except NotImplementedError as error:
      dispatch.say_once(logging.WARNING, 'mla_prefill', f'no cuDNN: {error}')
      impl = None
  return dispatch.run('mla_prefill', impl, functions, *args)
