"""Formats of a token's row on its way to an expert, and back.

DeepSeek-V3 (arXiv:2412.19437, section 3.3.3) sends tokens as float8 with a
scale per 128 numbers and brings results back as bfloat16. Backward they change
places: the gradient of a dispatch is a combine, that of a combine a dispatch.
Legend: M rows, D width.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from pallas_kernels import quantize

FORMATS = ('compute', 'bfloat16', 'float8')
_GROUP = 128  # numbers that one scale covers


def check(dim: int, dispatch: str) -> None:
  """Raises InputError where rows of `dim` numbers have no such format."""
  if dispatch == 'float8' and dim % _GROUP:
    raise InputError(
      f"mesh.exchange.dispatch = 'float8': dim = {dim} is no multiple of"
      f" {_GROUP}; use 'bfloat16'"
    )


def encode(
  x: jax.Array, form: str, floor: float = 0.0
) -> tuple[jax.Array, ...]:
  """Returns x [M D] as the arrays that travel, each with M rows.

  Args:
    x: tokens, results, or the gradients of either.
    form: one of FORMATS.
    floor: no 128 numbers count as smaller in float8; 0 for gradients.
  """
  if form == 'float8':
    q, scales = quantize.quantize(x, block=(1, _GROUP), floor=floor)
    # As bits: not every backend's collectives know float8, and XLA:CPU's send
    # bfloat16 as float32.
    return jax.lax.bitcast_convert_type(q, jnp.uint8), scales
  if form == 'bfloat16':
    return (jax.lax.bitcast_convert_type(x.astype(form), jnp.uint16),)
  return (x,)


def decode(
  parts: tuple[jax.Array, ...], form: str, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Returns the rows [M D] that `encode` made, in `dtype`."""
  if form == 'float8':
    q, scales = parts
    q = jax.lax.bitcast_convert_type(q, jnp.float8_e4m3fn)
    return quantize.dequantize(q, scales, jnp.dtype(dtype))
  (x,) = parts
  if form == 'bfloat16':
    x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
  return x.astype(dtype)


def row_bytes(dim: int, form: str, dtype: jax.typing.DTypeLike) -> int:
  """Returns the bytes of one row in `form`, computed with in `dtype`."""
  if form == 'float8':
    return dim + 4 * (dim // _GROUP)
  return dim * jnp.dtype(dtype if form == 'compute' else form).itemsize
