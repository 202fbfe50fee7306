"""SwiGLU whose result, or whose gradient, comes out in block-scaled float8.

What a float8 product takes next leaves the activation as float8, with a scale
per 1 x 128 (DeepSeek-V3, arXiv:2412.19437, section 3.3): the activation itself
is never stored. Legend: M rows, F width of the result.
"""

import functools
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.quantize import check_floor
from pallas_kernels.swiglu_quantize import reference

__all__ = ['swiglu_gradient', 'swiglu_quantize']


def swiglu_quantize(
  gate_up: jax.Array,
  *,
  limit: float | None = None,
  power_of_two: bool = False,
  floor: float = 0.0,
  impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns silu(gate) * up in float8 [M F] and its scales [M F/128] float32.

  The same as `quantize` of it, computed in float32 without a rounding between.

  Args:
    gate_up: [M 2F] bfloat16 or float32, the gate's columns first; F is a
      multiple of 128.
    limit: silu(min(gate, limit)) * clip(up, -limit, limit) (DeepSeek-V4).
    power_of_two, floor: as in `quantize`.
    impl: None, 'reference' or 'gpu'.

  Raises:
    ValueError: a width without whole halves of 128 * n, or a negative floor.
    NotImplementedError: impl='gpu' for a dtype that the kernel can't take, or
      differentiation: `swiglu_gradient` is the gradient.
  """
  _check(gate_up)
  check_floor(floor)
  return _forward(gate_up, limit, power_of_two, floor, dispatch.chosen(impl))


def swiglu_gradient(
  gate_up: jax.Array,
  grad: jax.Array,
  *,
  limit: float | None = None,
  power_of_two: bool = False,
  impl: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the gradient of gate_up, as it is and in float8.

  Args:
    gate_up: [M 2F], as for `swiglu_quantize`.
    grad: [M F] of silu(gate) * up, of the same dtype.
    limit, impl: as there.
    power_of_two: of the scales. A gradient has no floor.

  Returns:
    [M 2F] of gate_up.dtype, and of the same numbers float8 [M 2F] with scales
    [M 2F/128] float32.

  Raises:
    ValueError: shapes or dtypes that don't fit each other.
    NotImplementedError: impl='gpu' for a dtype that the kernel can't take.
  """
  _check(gate_up)
  M, width = gate_up.shape
  if grad.shape != (M, width // 2) or grad.dtype != gate_up.dtype:
    raise ValueError(
      f'grad is {grad.dtype} {list(grad.shape)}, but gate_up asks for'
      f' {gate_up.dtype} {[M, width // 2]}'
    )

  def gpu(*args: Any) -> tuple:
    from pallas_kernels.swiglu_quantize import gpu

    return gpu.gradient(*args)

  args = (gate_up, grad, limit, power_of_two)
  functions = {'reference': reference.gradient, 'gpu': gpu}
  impl = dispatch.chosen(impl)
  return dispatch.run('swiglu_gradient', impl, functions, *args)


def _check(gate_up: jax.Array) -> None:
  """Raises ValueError unless gate_up is a matrix of halves of 128 * n."""
  if gate_up.ndim != 2 or gate_up.shape[1] % 256:
    raise ValueError(
      f'gate_up is {list(gate_up.shape)}: not a matrix of two halves of 128 * n'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _forward(
  gate_up: jax.Array,
  limit: float | None,
  power_of_two: bool,
  floor: float,
  impl: str | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns q and scales; they have no gradient."""

  def gpu(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.swiglu_quantize import gpu

    return gpu.forward(*args)

  args = (gate_up, limit, power_of_two, floor)
  functions = {'reference': reference.forward, 'gpu': gpu}
  return dispatch.run('swiglu_quantize', impl, functions, *args)


def _no_gradient(*_) -> None:
  """Raises NotImplementedError: rounding has no gradient of its own."""
  raise NotImplementedError(
    'swiglu_quantize has no gradient: use swiglu_gradient in a function with'
    ' its own VJP'
  )


_forward.defvjp(lambda *args: (_forward(*args), None), _no_gradient)
