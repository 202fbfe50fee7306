"""Rounds the indexer's queries and keys to float8 (DeepSeek-V3.2's inference).

The released code multiplies both by a Hadamard matrix over the root of their
width, which leaves products as they are and spreads what is large in a few
channels, and then takes 8 bits a number with one scale for each vector, a power
of two (UE8M0; arXiv:2512.02556, section 2.1). So these numbers are numbers of
bfloat16, too.
Legend: B batch, S keys, I index dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import query_blocks
from pallas_kernels.quantize import ACTIVATION_FLOOR, quantize

FP8 = jnp.float8_e4m3fn
WIDE = jnp.bfloat16  # holds each of these numbers


class FP8Keys(NamedTuple):
  """Holds index keys in float8, multiplied by a Hadamard matrix."""

  codes: jax.Array  # [B S I] float8_e4m3fn
  scales: jax.Array  # [B S] float32

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns [B S I]."""
    return self.codes.shape


Keys = jax.Array | FP8Keys


def empty(shape: tuple[int, int, int], dtype: jax.typing.DTypeLike) -> Keys:
  """Returns keys [B S I] that are all zero; those of float8 have scales."""
  codes = jnp.zeros(shape, dtype)
  if dtype != FP8:
    return codes
  return FP8Keys(codes, jnp.zeros(shape[:2], jnp.float32))


def encoded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns vectors [... I] in float8 and their scales [...], I = 2^n."""
  from scipy.linalg import hadamard  # late: few ask for it

  I = x.shape[-1]
  turned = jnp.matmul(
    x, hadamard(I, x.dtype), preferred_element_type=jnp.float32
  )
  # Rounded as the model computes, as the released code does before it scales.
  turned = (turned * I**-0.5).astype(x.dtype)
  codes, scales = quantize(
    turned.reshape(-1, I),
    block=(1, I),
    power_of_two=True,
    floor=ACTIVATION_FLOOR,
    impl='reference',
  )
  return codes.reshape(x.shape), scales.reshape(x.shape[:-1])


def decoded(codes: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns codes [... I] times their scales [...] in bfloat16, exactly."""
  return (codes.astype(jnp.float32) * scales[..., None]).astype(WIDE)


def wide(keys: Keys) -> jax.Array:
  """Returns keys [B S I] as numbers of no format."""
  return decoded(*keys) if isinstance(keys, FP8Keys) else keys


def rows(keys: Keys, at: jax.Array) -> jax.Array:
  """Returns keys [B S I] at places [B ...]: [B ... I] of no format."""
  pick = lambda a: query_blocks.rows(a, at)
  return wide(jax.tree.map(pick, keys))
