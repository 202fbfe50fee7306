"""Compression of tokens into latents, and their write into a paged cache.

x @ W_kva, RMSNorm of the latent, rope of the shared key (DeepSeek-V2,
arXiv:2405.04434, section 2.1.2), then a write into a paged cache: bfloat16, or
656 bytes a token with the latent in float8 (a scale per 128 numbers) and the
rotary key in bfloat16. Legend: N tokens, D model, C latent, R rope dim,
P pages, G tokens per page.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.latent_kv import reference
from pallas_kernels.quantize import ACTIVATION_FLOOR, check_floor

__all__ = ['FP8Pages', 'Pages', 'latent_kv', 'pack', 'unpack']


class Pages(NamedTuple):
  """Holds a cache in one float dtype."""

  c: jax.Array  # [P G C], normed
  k_r: jax.Array  # [P G R], rotated


class FP8Pages(NamedTuple):
  """Holds a cache with float8 latents, c * scales of each 128 numbers."""

  c: jax.Array  # [P G C] float8_e4m3fn
  scales: jax.Array  # [P G C/128] float32
  k_r: jax.Array  # [P G R] bfloat16


def latent_kv(
  x: jax.Array,
  w: jax.Array,
  gain: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  slots: jax.Array,
  cache: Pages | FP8Pages,
  *,
  eps: float = 1e-6,
  floor: float = ACTIVATION_FLOOR,
  interleaved: bool = True,
  splits: int | None = None,
  impl: str | None = None,
) -> Pages | FP8Pages:
  """Returns the cache with the latents of x written at `slots`.

  Args:
    x: [N D] tokens, after the norm of their block.
    w: [D C+R] the down-projection W_kva.
    gain: [C] of the RMSNorm of the latent.
    cos, sin: [N R/2] float32 of each token's rotary angles.
    slots: [N] int32, page * G + offset of each token; different tokens have
      different slots, and one outside of the cache is not written.
    cache: Pages or FP8Pages. Donate it where this is jitted: the kernel then
      writes in place.
    eps: of the RMSNorm.
    floor: no 128 numbers of an FP8Pages' latent count as smaller, as in
      quantize.
    interleaved: pairs of channels are (2i, 2i+1), else (i, i + R/2).
    splits: parts that the width is cut into on the GPU; None picks one for
      many tokens, and enough to fill the device for few.
    impl: None, 'reference' or 'gpu' (bfloat16 x, w and Pages or FP8Pages;
      C=512, R=64, D a multiple of 64).

  Returns:
    The cache. Products, norm and rope are float32, rounded once when stored.

  Raises:
    ValueError: shapes that don't fit each other, or a negative floor.
    NotImplementedError: impl='gpu' for what the kernel can't take, or
      differentiation.
  """
  _check(x, w, gain, cos, sin, slots, cache)
  check_floor(floor)
  cache = type(cache)(*map(jnp.asarray, cache))
  args = (x, w, gain, cos, sin, jnp.asarray(slots), cache)
  impl = dispatch.chosen(impl)
  return _latent_kv(*args, eps, floor, interleaved, splits, impl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10, 11))
def _latent_kv(
  x: jax.Array,
  w: jax.Array,
  gain: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  slots: jax.Array,
  cache: Pages | FP8Pages,
  eps: float,
  floor: float,
  interleaved: bool,
  splits: int | None,
  impl: str | None,
) -> Pages | FP8Pages:
  """Returns the cache with the latents written; it has no gradient."""

  def gpu(*args: Any) -> Any:
    from pallas_kernels.latent_kv import gpu

    return gpu.latent_kv(*args, splits)

  args = (x, w, gain, cos, sin, slots, cache, eps, floor, interleaved)
  functions = {'reference': reference.latent_kv, 'gpu': gpu}
  return dispatch.run('latent_kv', impl, functions, *args)


def _no_gradient(*_) -> None:
  """Raises NotImplementedError: a cache keeps no gradient."""
  raise NotImplementedError(
    'latent_kv has no gradient: it fills caches, which training does not keep'
  )


_latent_kv.defvjp(lambda *args: (_latent_kv(*args), None), _no_gradient)


def _check(
  x: jax.Array,
  w: jax.Array,
  gain: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  slots: jax.Array,
  cache: Pages | FP8Pages,
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  (N, D), C, R = x.shape, gain.shape[0], w.shape[1] - gain.shape[0]
  P, G = cache.c.shape[:2]
  wanted = {
    'w': (w, (D, C + R)),
    'cos': (cos, (N, R // 2)),
    'sin': (sin, (N, R // 2)),
    'slots': (slots, (N,)),
    'cache.c': (cache.c, (P, G, C)),
    'cache.k_r': (cache.k_r, (P, G, R)),
  }
  if isinstance(cache, FP8Pages):
    wanted['cache.scales'] = (cache.scales, (P, G, C // reference.GROUP))
    if C % reference.GROUP:
      raise ValueError(f'gain is [{C}]: float8 needs {reference.GROUP} * n')
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} is {list(array.shape)}, but x {list(x.shape)}, w '
        f'{list(w.shape)} and gain {list(gain.shape)} ask for {list(shape)}'
      )


def pack(cache: FP8Pages) -> jax.Array:
  """Returns [P G C + 4 C/128 + 2 R] uint8: each token in one record.

  Latent, scales and key adjoin; at C=512, R=64 it is FlashMLA's 656 bytes.
  """
  parts = [jax.lax.bitcast_convert_type(a, jnp.uint8) for a in cache]
  parts = [a.reshape(*cache.c.shape[:2], -1) for a in parts]
  return jnp.concatenate(parts, axis=-1)


def unpack(records: jax.Array, latent: int = 512) -> FP8Pages:
  """Returns the cache that `pack` packed; C is `latent`."""
  group = latent // reference.GROUP
  c, scales, k_r = jnp.split(records, [latent, latent + 4 * group], axis=-1)

  def view(bytes_: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    size = jnp.dtype(dtype).itemsize
    wide = bytes_.reshape(*bytes_.shape[:-1], -1, size)
    wide = wide[..., 0] if size == 1 else wide
    return jax.lax.bitcast_convert_type(wide, dtype)

  return FP8Pages(
    view(c, jnp.float8_e4m3fn),
    view(scales, jnp.float32),
    view(k_r, jnp.bfloat16),
  )
