"""Block-scaled float8 in XLA."""

import jax
import jax.numpy as jnp

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
# DeepSeek's kernels count no block of activations as smaller than this
# (DeepGEMM, per_token_cast_to_fp8). Gradients have no natural size: a mean
# over many tokens makes all of them smaller.
ACTIVATION_FLOOR = 1e-4
# The least scale whose inverse is normal too; that of a block of zeros.
LEAST_SCALE = 2.0**-126
# 448 of these overflow, so that an infinity comes back as one.
INFINITE_SCALE = 2.0**120


def scales_of(
  amax: jax.Array, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the scale of each block and what to multiply the block by.

  Both are normal float32 for every amax, NaN and infinity included, so that
  no other number of the block becomes NaN.

  Args:
    amax: float32, the largest magnitude of each block.
    power_of_two: rounds scales up to powers of two.
    floor: no amax counts as less; 0 for none.
  """
  finite = amax < jnp.inf
  amax = jnp.maximum(amax, max(floor, FP8_MAX * LEAST_SCALE))
  if not power_of_two:
    pick = lambda scale, other: jnp.where(finite, scale, other)
    scale = pick(amax / FP8_MAX, INFINITE_SCALE)
    return scale, pick(FP8_MAX / amax, 1 / INFINITE_SCALE)
  amax = jnp.where(finite, amax, jnp.finfo(jnp.float32).max)
  # The next power of two from the bits: exact, as a logarithm is not.
  bits = jax.lax.bitcast_convert_type(amax * (1 / FP8_MAX), jnp.int32)
  exponent = (bits + 0x7FFFFF) & 0x7F800000
  power = lambda b: jax.lax.bitcast_convert_type(b, jnp.float32)
  return power(exponent), power(jnp.int32(254 << 23) - exponent)


def _blocks(x: jax.Array, block: tuple[int, int]) -> jax.Array:
  """Returns x [N D] as blocks [N/R R D/C C]."""
  R, C = block
  return x.reshape(x.shape[0] // R, R, x.shape[1] // C, C)


def quantize(
  x: jax.Array, block: tuple[int, int], power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns q [N D] and scales [N/R D/C]."""
  parts = _blocks(x.astype(jnp.float32), block)
  amax = jnp.abs(parts).max(axis=(1, 3), keepdims=True)
  scale, gain = scales_of(amax, power_of_two, floor)
  q = jnp.clip(parts * gain, -FP8_MAX, FP8_MAX).astype(FP8)
  # XLA for GPUs takes a conversion there and back for none at all (it may keep
  # more precision than asked for), and nothing would be rounded.
  q = jax.lax.optimization_barrier(q)
  return q.reshape(x.shape), scale[:, 0, :, 0]


def dequantize(
  q: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Returns q times the scale of each block, in `dtype`."""
  if not q.size:
    return q.astype(dtype)
  block = (q.shape[0] // scales.shape[0], q.shape[1] // scales.shape[1])
  parts = _blocks(q.astype(jnp.float32), block)
  return (parts * scales[:, None, :, None]).reshape(q.shape).astype(dtype)


def columns(
  x: jax.Array,
  scales: jax.Array | None,
  rows: int,
  power_of_two: bool,
  floor: float,
  dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Returns x.T [D N] in float8, and scales [D N/rows]."""
  if scales is not None:
    x = dequantize(x, scales, dtype)
  return quantize(x.T, (1, rows), power_of_two, floor)
