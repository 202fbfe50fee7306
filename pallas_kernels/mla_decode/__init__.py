"""Latent attention of a few new tokens over a paged cache (absorbed MLA).

DeepSeek-V2 (arXiv:2405.04434, section 2.1.2) with k_up absorbed into the query
and v_up left to the caller: every head attends to one shared 'head' of keys
[c, k_r] and values c. Legend: B requests, T new tokens (the last T of each
request, causal among themselves), H heads, C latent, R rope dim, P pages,
G tokens per page, J pages per request.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.mla_decode import reference

__all__ = ['mla_decode', 'refused']


def mla_decode(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  *,
  scale: float,
  scales: jax.Array | None = None,
  splits: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Returns softmax(scale * (q_c c + q_r k_r)) c over the cached tokens.

  Args:
    q_c: [B T H C] queries times k_up.
    q_r: [B T H R] rotary part of the queries.
    c: [P G C] pages of latents, the T new tokens included.
    k_r: [P G R] pages of shared rotary keys.
    table: [B J] int32, the pages of each request in order; what lies behind
      the length may be anything. A cache [B S .] without pages is one page
      per request: G = S, table = arange(B)[:, None].
    lengths: [B] int32, cached tokens of each request, new ones included; no
      more than the J G that its pages hold count.
      Query t attends to the first lengths - (T - 1 - t); none of them gives 0.
    scale: of the scores, usually (nope + rope dims of the expanded head)**-.5.
    scales: [P G C/128] float32 where c is float8 (latent_kv's FP8Pages), each
      of 128 numbers of a latent; or None.
    splits: parts that a request's tokens are split into on the GPU, merged at
      the end; None picks enough to fill the device.
    impl: None, 'reference', 'gpu' (bfloat16, c maybe float8_e4m3fn, C=512,
      R=64, G a multiple of 64; partial sums of several splits are rounded to
      bfloat16 once, and so is a float8 latent times its scale; scale > 0) or
      'tpu' (all bfloat16 or all float32, G a multiple of 16; weights are
      rounded to that dtype before they are summed over).

  Returns:
    [B T H C] of q_c.dtype. Scores, softmax and sums are float32.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' or 'tpu' for what the kernel can't take.
  """
  _check(q_c, q_r, c, k_r, table, lengths, scales)

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.mla_decode import gpu

    return gpu.mla_decode(*args, splits)

  def tpu(*args: Any) -> jax.Array:
    from pallas_kernels.mla_decode import tpu

    return tpu.mla_decode(*args)

  # Nothing is read behind the table, nor from a page that does not exist.
  lengths = jnp.clip(lengths, 0, table.shape[1] * c.shape[1])
  table = jnp.clip(table, 0, c.shape[0] - 1)
  args = (q_c, q_r, c, k_r, table, lengths, scale, scales)
  functions = {'reference': reference.mla_decode, 'gpu': gpu, 'tpu': tpu}
  return dispatch.run('mla_decode', impl, functions, *args)


def refused(
  impl: str,
  queries: jax.typing.DTypeLike,
  c: jax.Array,
  k_r: jax.Array,
  scales: jax.Array | None = None,
) -> str:
  """Returns why the kernel can't take pages, or ''.

  Args:
    impl: 'gpu' or 'tpu'.
    queries: their dtype.
    c: [... P G C] latents.
    k_r: [... P G R] rotary keys.
    scales: [... P G C/128] where c is float8.
  """
  from pallas_kernels.mla_decode import gpu, tpu

  kernel = {'gpu': gpu, 'tpu': tpu}[impl]
  try:
    kernel.check_pages(jnp.dtype(queries), c, k_r, scales)
  except NotImplementedError as error:
    return str(error)
  return ''


def _check(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  scales: jax.Array | None,
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  B, T, H, C = q_c.shape
  wanted = {
    'q_r': (q_r, (B, T, H, k_r.shape[-1])),
    'c': (c, (*k_r.shape[:2], C)),
    'table': (table, (B, table.shape[-1])),
    'lengths': (lengths, (B,)),
  }
  if scales is not None:
    wanted['scales'] = (scales, (*k_r.shape[:2], C // 128))
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but q_c {list(q_c.shape)} and k_r '
        f'{list(k_r.shape)} ask for {list(shape)}'
      )
