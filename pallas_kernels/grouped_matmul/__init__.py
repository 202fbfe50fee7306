"""Rows in blocks, each block times the matrix of its expert.

The product is in bfloat16, maybe with a SwiGLU as epilogue, or in float8 with
block scales. The layout comes from `pallas_kernels.permute.plan`.
Legend: M rows, E experts, D width in, F width out.
"""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quantize import (
  ACTIVATION_FLOOR,
  quantize,
  quantize_columns,
)

__all__ = ['grouped_matmul', 'grouped_matmul_fp8', 'grouped_swiglu']


def _run(name: str, impl: str | None, *args: Any) -> jax.Array:
  """Runs the kernel or the reference function of that name."""
  module = lambda device: importlib.import_module(f'{__name__}.{device}')
  kernel = lambda device, *args: getattr(module(device), name)(*args)
  # On a TPU XLA's own product is as good where nothing is transposed.
  devices = ('gpu', 'tpu') if name == 'outer' or args[-1] else ('gpu',)
  functions = {'reference': getattr(reference, name)}
  functions |= {d: functools.partial(kernel, d) for d in devices}
  return dispatch.run(f'grouped_matmul.{name}', impl, functions, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _matmul(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
  impl: str | None,
) -> jax.Array:
  """Returns the product [M F]; its gradients are products too."""
  args = (rows, weights, block_expert, used, transpose)
  return _run('forward', impl, *args)


def _fwd(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
  impl: str | None,
) -> tuple:
  """Returns the product and what the backward pass keeps."""
  out = _matmul(rows, weights, block_expert, used, transpose, impl)
  return out, (rows, weights, block_expert, used)


def _bwd(
  transpose: bool, impl: str | None, saved: tuple, grad: jax.Array
) -> tuple:
  """Returns the gradients of rows and weights."""
  rows, weights, expert, used = saved
  drows = _run('forward', impl, grad, weights, expert, used, not transpose)
  pair = (grad, rows) if transpose else (rows, grad)
  dweights = _run('outer', impl, *pair, expert, used, weights.shape[0])
  return drows, dweights.astype(weights.dtype), None, None


_matmul.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _fp8(
  rows: jax.Array,
  row_scales: jax.Array,
  weights: jax.Array,
  weight_scales: jax.Array,
  expert: jax.Array,
  used: jax.Array,
  dtype: jax.typing.DTypeLike,
  impl: str | None,
) -> jax.Array:
  """Returns the product [M F] of float8 operands and their scales."""

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.grouped_matmul import fp8

    return fp8.forward(*args, dtype)

  def plain(*args: Any) -> jax.Array:
    return reference.forward_fp8(*args, dtype)

  args = (rows, row_scales, weights, weight_scales, expert, used)
  functions = {'reference': plain, 'gpu': gpu}
  return dispatch.run('grouped_matmul_fp8', impl, functions, *args)


def _no_gradient(*_) -> None:
  """Raises NotImplementedError: float8 inputs have no gradient."""
  raise NotImplementedError(
    'grouped_matmul_fp8 has no gradient; grouped_matmul(float8=True) has'
  )


_fp8.defvjp(lambda *args: (_fp8(*args), None), _no_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _float8(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
  impl: str | None,
) -> jax.Array:
  """Returns the product [M F], quantising both operands first."""
  args = (rows, weights, block_expert, used, transpose, impl)
  return _float8_fwd(*args)[0]


def _float8_fwd(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
  impl: str | None,
) -> tuple:
  """Returns the product, and the operands in float8 for the backward pass."""
  x = quantize(rows, power_of_two=True, floor=ACTIVATION_FLOOR, impl=impl)
  layout = block_expert, used
  out, w = float8_product(x, weights, *layout, transpose, rows.dtype, impl)
  return out, (x, w, *layout, jnp.zeros((), weights.dtype))


def float8_product(
  x: tuple[jax.Array, jax.Array],
  weights: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  transpose: bool,
  dtype: jax.typing.DTypeLike,
  impl: str | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the product of float8 rows [M F] of dtype, and float8 weights."""
  w = _squares(weights, impl)
  right = w if transpose else _transposed(*w)
  return _fp8(*x, *right, block_expert, used, dtype, impl), w


def float8_gradients(
  transpose: bool,
  impl: str | None,
  saved: tuple,
  grad: jax.Array,
  quantized: tuple[jax.Array, jax.Array] | None = None,
) -> tuple:
  """Returns the gradients of rows and weights by float8 products.

  Args:
    transpose, impl: of the product.
    saved: rows and weights in float8, the layout, and a scalar of the dtype
      that the gradient of the weights has.
    grad: [M F] of the result.
    quantized: the same in float8 with a scale per 1 x 128, where it is so.
  """
  x, w, expert, used, like = saved
  g = quantized or quantize(grad, power_of_two=True, impl=impl)
  right = _transposed(*w) if transpose else w
  drows = _fp8(*g, *right, expert, used, grad.dtype, impl)

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.grouped_matmul import fp8

    return fp8.outer(*args)

  block = grad.shape[0] // max(expert.shape[0], 1)
  # With a scale per 128 rows of one expert.
  over_rows = functools.partial(
    quantize_columns,
    rows=math.gcd(block, 128),
    power_of_two=True,
    dtype=grad.dtype,
    impl=impl,
  )
  pair = (over_rows(*x, floor=ACTIVATION_FLOOR), over_rows(grad))
  left, right = reversed(pair) if transpose else pair
  args = (*left, *right, expert, used, w[0].shape[0], grad.dtype)
  functions = {'reference': reference.outer_fp8, 'gpu': gpu}
  dweights = dispatch.run('grouped_matmul_fp8.outer', impl, functions, *args)
  return drows, dweights.astype(like.dtype), None, None


_float8.defvjp(_float8_fwd, float8_gradients)


def _squares(
  weights: jax.Array, impl: str | None
) -> tuple[jax.Array, jax.Array]:
  """Returns weights [E D F] in float8 with a scale per 128 x 128."""
  E, D, F = weights.shape
  q, scales = quantize(weights.reshape(-1, F), block=(128, 128), impl=impl)
  return q.reshape(E, D, F), scales.reshape(E, D // 128, F // 128)


def _transposed(
  weights: jax.Array, scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns weights and scales with the last two axes exchanged."""
  return weights.swapaxes(1, 2), scales.swapaxes(1, 2)


def grouped_matmul(
  rows: jax.Array,
  weights: jax.Array,
  block_expert: jax.Array,
  *,
  used: jax.Array | None = None,
  transpose: bool = False,
  float8: bool = False,
  impl: str | None = None,
) -> jax.Array:
  """Returns rows[m] @ weights[block_expert[m // block]] for every m.

  Args:
    rows: [M D] float.
    weights: [E D F], or [E F D] with `transpose`.
    block_expert: [M // block] int32, each in 0..E-1 (else the nearest of
      them); the block is inferred.
      Blocks of one expert adjoin, as in a plan (the kernel's gradient of the
      weights relies on it).
    used: [] int32, how many leading blocks hold rows (`plan.used`); the rows
      after them must be zero and may be skipped. None: all of them.
    transpose: multiply by the transposed matrices.
    float8: the three products of training in float8, as DeepSeek-V3 does
      (arXiv:2412.19437, section 3.3.2): see `grouped_matmul_fp8`. Rows and
      gradients have a scale per 128 of what is summed over (for the gradient
      of the weights: per gcd(block, 128) rows), weights one per 128 x 128; D
      and F are multiples of 128. The rows are kept in float8 until the
      backward pass, so their scales, and the gradients', are powers of two.
      No 128 numbers of the rows count as smaller than ACTIVATION_FLOOR;
      gradients and weights have no floor, so the error of a gradient does not
      depend on the scale of the loss.
    impl: None, 'reference', 'gpu' (bfloat16, blocks of 64 * n rows, with
      float8 of 128 * n for the gradient, D and F multiples of 128) or 'tpu'
      (bfloat16 or float32, blocks of 16 * n rows; float8 is the reference's).

  Returns:
    [M F] of rows.dtype, accumulated in float32. Differentiable in rows and
    weights.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' or 'tpu' for what the kernel can't take.
  """
  inner = weights.shape[2 if transpose else 1]
  if inner != rows.shape[1]:
    raise ValueError(
      f'rows {list(rows.shape)} and weights {list(weights.shape)} '
      f'(transpose={transpose}) disagree on the width: {rows.shape[1]} and '
      f'{inner}'
    )
  layout = _layout(rows, weights.shape[0], block_expert, used)
  impl = dispatch.chosen(impl)
  if not float8:
    return _matmul(rows, weights, *layout, transpose, impl)
  for width in weights.shape[1:]:
    if width % 128:
      raise ValueError(f'float8: width {width} is not a multiple of 128')
  return _float8(rows, weights, *layout, transpose, impl)


def _layout(
  rows: jax.Array,
  experts: int,
  block_expert: jax.Array,
  used: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns block_expert and used as arrays, within experts and rows."""
  block_expert = jnp.asarray(block_expert)
  blocks = block_expert.shape[0]
  if rows.shape[0] % blocks if blocks else rows.shape[0]:
    raise ValueError(
      f'{rows.shape[0]} rows are no multiple of the {blocks} blocks'
    )
  used = jnp.asarray(blocks if used is None else used, jnp.int32)
  # Past either end there is nothing to read.
  return jnp.clip(block_expert, 0, experts - 1), jnp.clip(used, 0, blocks)


def _activate(gate_up: jax.Array, limit: float | None) -> jax.Array:
  """Returns silu(gate) * up of the halves [M 2F], in float32."""
  gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
  if limit is not None:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return jax.nn.silu(gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _swiglu(
  rows: jax.Array,
  gate_up: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  limit: float | None,
  impl: str | None,
) -> jax.Array:
  """Returns silu(gate) * up [M F]; its gradient recomputes the product."""

  def gpu(*args: Any) -> jax.Array:
    from pallas_kernels.grouped_matmul import swiglu

    return swiglu.forward(*args, limit)

  def plain(*args: Any) -> jax.Array:
    return _activate(reference.forward(*args, False), limit).astype(rows.dtype)

  args = (rows, gate_up, block_expert, used)
  functions = {'reference': plain, 'gpu': gpu}
  return dispatch.run('grouped_swiglu', impl, functions, *args)


def _swiglu_fwd(
  rows: jax.Array,
  gate_up: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  limit: float | None,
  impl: str | None,
) -> tuple:
  """Returns the result, and the inputs alone for the backward pass."""
  out = _swiglu(rows, gate_up, block_expert, used, limit, impl)
  return out, (rows, gate_up, block_expert, used)


def _swiglu_bwd(
  limit: float | None, impl: str | None, saved: tuple, grad: jax.Array
) -> tuple:
  """Returns the gradients of rows and gate_up."""
  # The product of width 2F is recomputed rather than stored.
  h, pull = jax.vjp(
    lambda r, w: _matmul(r, w, *saved[2:], False, impl), *saved[:2]
  )
  dh = jax.vjp(lambda h: _activate(h, limit), h)[1](grad.astype(jnp.float32))
  return *pull(dh[0]), None, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def grouped_swiglu(
  rows: jax.Array,
  gate_up: jax.Array,
  block_expert: jax.Array,
  *,
  used: jax.Array | None = None,
  limit: float | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Returns silu(gate) * up of rows[m] @ gate_up[block_expert[m // block]].

  The product itself, twice as wide as the result, is never stored; the
  backward pass recomputes it.

  Args:
    rows: [M D] float.
    gate_up: [E D 2F], the gate's columns before the up-projection's.
    block_expert, used: as in grouped_matmul.
    limit: silu(min(gate, limit)) * clip(up, -limit, limit) (DeepSeek-V4).
    impl: None, 'reference' or 'gpu' (bfloat16, blocks of 64 * n rows, D and
      F multiples of 128; the reference and the backward pass round the
      product to the rows' dtype, the forward kernel doesn't).

  Returns:
    [M F] of rows.dtype, differentiable in rows and gate_up.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  if gate_up.shape[1] != rows.shape[1] or gate_up.shape[2] % 2:
    raise ValueError(
      f'gate_up is {list(gate_up.shape)}, but rows {list(rows.shape)} ask '
      f'for [E {rows.shape[1]} 2F]'
    )
  layout = _layout(rows, gate_up.shape[0], block_expert, used)
  impl = dispatch.chosen(impl)
  return _swiglu(rows, gate_up, *layout, limit, impl)


def grouped_matmul_fp8(
  rows: jax.Array,
  row_scales: jax.Array,
  weights: jax.Array,
  weight_scales: jax.Array,
  block_expert: jax.Array,
  *,
  used: jax.Array | None = None,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  impl: str | None = None,
) -> jax.Array:
  """Returns grouped_matmul of float8 numbers with a scale per block.

  Each 128 of the width are multiplied, scaled and added up in float32
  (arXiv:2412.19437, section 3.3.2).

  Args:
    rows: [M D] float8, as quantize(x) gives them.
    row_scales: [M D/128] float32, of 1 x 128 blocks.
    weights: [E F D] float8: transposed, for float8 products want it so.
    weight_scales: [E F/128 D/128] float32, of 128 x 128 blocks.
    block_expert, used: as in grouped_matmul.
    dtype: of the result.
    impl: None, 'reference' or 'gpu' (float8_e4m3fn into bfloat16, blocks of
      64 * n rows, D and F multiples of 128).

  Returns:
    [M F] of dtype. No gradient: grouped_matmul(float8=True) has one.

  Raises:
    ValueError: shapes that don't fit each other.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take, or
      differentiation.
  """
  (M, D), (E, F, _) = rows.shape, weights.shape
  wanted = {
    'weights': (weights, (E, F, D)),
    'row_scales': (row_scales, (M, D // 128)),
    'weight_scales': (weight_scales, (E, F // 128, D // 128)),
  }
  for name, (array, shape) in wanted.items():
    if array.shape != shape or D % 128 or F % 128:
      raise ValueError(
        f'{name} is {list(array.shape)}, but rows {list(rows.shape)} and '
        f'weights {list(weights.shape)} ask for {list(shape)} and widths of '
        '128 * n'
      )
  layout = _layout(rows, E, block_expert, used)
  args = (rows, row_scales, weights, weight_scales, *layout)
  return _fp8(*args, jnp.dtype(dtype), dispatch.chosen(impl))
