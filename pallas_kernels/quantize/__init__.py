"""Block-scaled float8: a scale per 1 x 128 activations or 128 x 128 weights.

DeepSeek-V3 (arXiv:2412.19437, section 3.3.2); scales that are powers of two
(UE8M0) since V3.1. Legend: N rows, D columns.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import ACTIVATION_FLOOR

__all__ = ['ACTIVATION_FLOOR', 'dequantize', 'quantize', 'quantize_columns']


def quantize(
  x: jax.Array,
  *,
  block: tuple[int, int] = (1, 128),
  power_of_two: bool = False,
  floor: float = 0.0,
  impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns x in float8 [N D] and its scales [N/R D/C] float32.

  x is about q * scale of its block. The scale is the largest magnitude of the
  block over 448, at least 2^-126; with power_of_two the next power of two from
  there up, which converts to float8_e8m0fnu without loss. Scales are never NaN
  or infinite; such numbers of x come back as they are. Without a floor q is
  the same for x and 2^-k x as long as scales stay above 2^-126. It has no
  gradient: wrap it in a function with its own VJP.

  Args:
    x: [N D] bfloat16 or float32.
    block: (R, C) that one scale covers; R divides N and C divides D.
    power_of_two: UE8M0 scales.
    floor: no block's magnitude counts as less. Published formats of
      activations have ACTIVATION_FLOOR; gradients must have none.
    impl: None, 'reference' or 'gpu' (blocks (1, 128) and (128, 128)).

  Raises:
    ValueError: x is not a matrix of whole blocks, or floor is negative or not
      finite.
    NotImplementedError: impl='gpu' for a block that the kernel can't take, or
      differentiation.
  """
  if x.ndim != 2 or x.shape[0] % block[0] or x.shape[1] % block[1]:
    raise ValueError(f'x is {list(x.shape)}: not a matrix of {block} blocks')
  check_floor(floor)
  return _quantize(x, block, power_of_two, floor, dispatch.chosen(impl))


def check_floor(floor: float) -> None:
  """Raises ValueError unless `floor` is a finite number of 0 or more."""
  if not 0 <= floor < math.inf:
    raise ValueError(
      f'floor = {floor}: must be 0 (none) or more and finite; activations have'
      f' {ACTIVATION_FLOOR:g}'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _quantize(
  x: jax.Array,
  block: tuple[int, int],
  power_of_two: bool,
  floor: float,
  impl: str | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns q and scales; they have no gradient."""

  def gpu(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.quantize import gpu

    return gpu.quantize(*args)

  args = (x, block, power_of_two, floor)
  functions = {'reference': reference.quantize, 'gpu': gpu}
  return dispatch.run('quantize', impl, functions, *args)


def quantize_columns(
  x: jax.Array,
  scales: jax.Array | None = None,
  *,
  rows: int = 128,
  power_of_two: bool = False,
  floor: float = 0.0,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns x.T in float8 [D N] and its scales [D N/rows] float32.

  What a product over rows takes, as of the gradient of weights: `quantize` of
  x.T, or of the transposed `dequantize(x, scales, dtype)`, by a kernel in one
  pass (on jax 0.10 XLA makes the transposed first). It has
  no gradient, as there.

  Args:
    x: [N D] bfloat16 or float32, or float8 with its scales.
    scales: [N D/128] float32 of a float8 x, else None.
    rows: that one scale covers; divides N.
    power_of_two, floor: as in `quantize`.
    dtype: of the numbers that float8 stands for.
    impl: None, 'reference' or 'gpu' (rows 128, N and D multiples of 128).

  Raises:
    ValueError: x is not a matrix of such blocks, scales don't fit it, or floor
      is negative or not finite.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take, or
      differentiation.
  """
  if x.ndim != 2 or x.shape[0] % rows:
    raise ValueError(f'x is {list(x.shape)}: not a matrix of {rows} * n rows')
  if (scales is None) == (x.dtype == reference.FP8):
    raise ValueError(f'x is {x.dtype}: float8 has scales, others have none')
  if scales is not None and x.shape[1] % 128:
    raise ValueError(f'x is {list(x.shape)}: float8 has columns of 128 * n')
  if scales is not None and scales.shape != (x.shape[0], x.shape[1] // 128):
    raise ValueError(
      f'scales are {list(scales.shape)}, but x {list(x.shape)} asks for'
      f' {[x.shape[0], x.shape[1] // 128]}'
    )
  check_floor(floor)
  how = rows, power_of_two, floor, jnp.dtype(dtype), dispatch.chosen(impl)
  return _quantize_columns(x, scales, *how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _quantize_columns(
  x: jax.Array,
  scales: jax.Array | None,
  rows: int,
  power_of_two: bool,
  floor: float,
  dtype: jnp.dtype,
  impl: str | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns q and scales; they have no gradient."""

  def gpu(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.quantize import columns

    return columns.columns(*args)

  args = (x, scales, rows, power_of_two, floor, dtype)
  functions = {'reference': reference.columns, 'gpu': gpu}
  return dispatch.run('quantize_columns', impl, functions, *args)


def _no_gradient(*_) -> None:
  """Raises NotImplementedError: rounding has no gradient of its own."""
  raise NotImplementedError(
    'quantize has no gradient: use it inside a function with its own VJP'
  )


_quantize.defvjp(lambda *args: (_quantize(*args), None), _no_gradient)
_quantize_columns.defvjp(
  lambda *args: (_quantize_columns(*args), None), _no_gradient
)


def dequantize(
  q: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """Returns q [N D] float8 times its scales [N/R D/C], in `dtype`."""
  if any(n % m if m else n for n, m in zip(q.shape, scales.shape)):
    raise ValueError(
      f'scales {list(scales.shape)} do not divide q {list(q.shape)}'
    )
  return reference.dequantize(q, scales, dtype)
