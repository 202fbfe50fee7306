"""Block-scaled float8 in XLA."""

import jax
import jax.numpy as jnp

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
TINY = 1e-4  # least amplitude of a block, so that a block of zeros has a scale


def scales_of(amax, power_of_two):
  """amax float32 -> (scale, what to multiply by) of each block."""
  amax = jnp.maximum(amax, TINY)
  if not power_of_two:
    return amax / FP8_MAX, FP8_MAX / amax
  # The next power of two from the bits: exact, as a logarithm is not.
  bits = jax.lax.bitcast_convert_type(amax * (1 / FP8_MAX), jnp.int32)
  exponent = (bits + 0x7FFFFF) & 0x7F800000
  power = lambda b: jax.lax.bitcast_convert_type(b, jnp.float32)
  return power(exponent), power(jnp.int32(254 << 23) - exponent)


def _blocks(x, block):
  R, C = block
  return x.reshape(x.shape[0] // R, R, x.shape[1] // C, C)


def quantize(x, block, power_of_two):
  parts = _blocks(x.astype(jnp.float32), block)
  amax = jnp.abs(parts).max(axis=(1, 3), keepdims=True)
  scale, gain = scales_of(amax, power_of_two)
  q = jnp.clip(parts * gain, -FP8_MAX, FP8_MAX).astype(FP8)
  return q.reshape(x.shape), scale[:, 0, :, 0]


def dequantize(q, scales, dtype):
  if not q.size:
    return q.astype(dtype)
  block = (q.shape[0] // scales.shape[0], q.shape[1] // scales.shape[1])
  parts = _blocks(q.astype(jnp.float32), block)
  return (parts * scales[:, None, :, None]).reshape(q.shape).astype(dtype)
