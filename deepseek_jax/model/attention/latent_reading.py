"""Computes latent attention of a batch to its own latents (expanded form).

DeepSeek-V2 (arXiv:2405.04434, section 2.1), on one device, on each shard of a
mesh, and where devices share a sequence.
Legend: B batch, T queries, S keys, H heads, C key-value latent, N no-rope dim,
R rope dim, V value dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model import kernels
from deepseek_jax.model.attention.softmax import causal_attention
from deepseek_jax.parallel import gathered_attention
from deepseek_jax.parallel import sequence as context
from deepseek_jax.parallel.gathered_attention import Sequence, expand_latents
from deepseek_jax.parallel.sequence import Along
from pallas_kernels import dispatch
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.quantize import ACTIVATION_FLOOR, dequantize, quantize

GROUP = 128  # numbers of a latent that one scale covers


class Latent(NamedTuple):
  """Holds all that MLA caches of tokens; also its cache."""

  c: jax.Array  # [B S C], normed
  kr: jax.Array  # [B S R], rotated


class FP8Latent(NamedTuple):
  """Holds the same in float8: a latent is c times the scale of each GROUP."""

  c: jax.Array  # [B S C] float8_e4m3fn
  kr: jax.Array  # [B S R] bfloat16
  scales: jax.Array  # [B S C/GROUP] float32


def encoded(latent: Latent) -> FP8Latent:
  """Returns latents [B S .] as they are cached in float8."""
  c, kr = latent
  q, scales = quantize(
    c.reshape(-1, c.shape[-1]),
    block=(1, GROUP),
    floor=ACTIVATION_FLOOR,
    impl='reference',
  )
  rows = lambda a: a.reshape(*c.shape[:-1], -1)
  # As in quantize: what reads them back at once must not get more precision.
  kr = jax.lax.optimization_barrier(kr.astype(jnp.bfloat16))
  return FP8Latent(rows(q), kr, rows(scales))


def decoded(held: Latent | FP8Latent, dtype: jax.typing.DTypeLike) -> Latent:
  """Returns cached latents [B S .] in `dtype`; those of no format as is."""
  if not isinstance(held, FP8Latent):
    return held
  flat = lambda a: a.reshape(-1, a.shape[-1])
  c = dequantize(flat(held.c), flat(held.scales), dtype)
  return Latent(c.reshape(held.c.shape), held.kr.astype(dtype))


def read_latents(
  along: Along,
  q: jax.Array,
  latents: Latent,
  up: jax.Array,
  seen: Sequence,
  scale: float,
) -> jax.Array:
  """Computes causal attention of the local queries to the latents of all.

  Args:
    along: which shard these queries are.
    q: [B T H N+R].
    latents: of all tokens.
    up: [C H N+V].
    seen: what the queries may attend to.
    scale: multiplies the scores.

  Returns:
    [B T H V].
  """
  if along.axis:
    args = q, latents, up, seen, scale
    own = lambda: gathered_attention.attend(expand_latents, *args)

    def by_kernel(impl: str) -> jax.Array:
      if impl == 'reference' and q.shape[2] % along.ways:
        return own()  # a reference takes everything
      return _exchanging_heads(along, *args, impl)

    shown = q, latents, up, seen.keys
    return kernels.pick_local('mla_prefill', by_kernel, own, shown)
  # Expanded form: keys [B S H N+R] and values [B S H V] of all heads.
  k, v = expand_latents(q.shape[2:], latents, up)
  segments, heads = seen.queries, ('batch', None, 'heads')
  return kernels.pick(
    'mla_prefill',
    lambda impl, *args: mla_prefill(
      *args, scale=scale, impl=dispatch.preferred(impl)
    ),
    lambda: causal_attention(q, k, v, scale=scale, segments=segments),
    (q, k, v, segments),
    (heads, heads, heads, ('batch',)),
    heads,
  )


def _exchanging_heads(
  along: Along,
  q: jax.Array,
  latents: Latent,
  up: jax.Array,
  seen: Sequence,
  scale: float,
  impl: str,
) -> jax.Array:
  """Computes `read_latents` on a shard of the heads, for all of their tokens.

  Devices that share a sequence exchange queries for heads and back
  (DeepSpeed-Ulysses, arXiv:2309.14509), so each has the same to do, and a
  kernel for whole sequences can do it.

  Raises:
    NotImplementedError: the devices don't divide the heads, or the kernel
      can't take them.
  """
  H, ways = q.shape[2], along.ways
  if H % ways:
    raise NotImplementedError(f'{H} heads, not a multiple of {ways} devices')
  # [B T H N+R] -> [B S H/ways N+R].
  q = jax.lax.all_to_all(q, along.axis, 2, 1, tiled=True)
  size = H // ways
  up = jax.lax.dynamic_slice_in_dim(up, along.index * size, size, axis=1)
  k, v = expand_latents(q.shape[2:], latents, up)
  own = dispatch.preferred(impl)
  y = mla_prefill(q, k, v, seen.keys, scale=scale, impl=own)
  return jax.lax.all_to_all(y, along.axis, 1, 2, tiled=True)


def latent_attention(
  q: jax.Array,
  latents: Latent,
  up: jax.Array,
  *,
  scale: float,
  segments: jax.Array | None = None,
) -> jax.Array:
  """Computes causal attention of a batch to its own latents, on each shard.

  Args:
    q: [B T H N+R].
    latents: of the same tokens.
    up: [C H N+V].
    scale: multiplies the scores.
    segments: [B T] int32 document of each token, or None for one document.

  Returns:
    [B T H V].
  """

  def local(
    along: Along,
    q: jax.Array,
    latents: Latent,
    up: jax.Array,
    segments: jax.Array | None,
  ) -> jax.Array:
    seen = gathered_attention.sequence(along, q.shape[1], segments)
    return read_latents(along, q, along.gather(latents), up, seen, scale)

  rows, heads = ('batch', 'seq'), ('batch', 'seq', 'heads')
  return context.split(
    local,
    (q, latents, up, segments),
    (heads, rows, (None, 'heads'), rows),
    heads,
    **dict(zip(heads, q.shape)),
  )
