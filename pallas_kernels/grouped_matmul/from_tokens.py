"""Tokens times the matrices of their experts in float8, quantised on the way.

A token is quantised once for all experts that it goes to, while its rows are
laid out: nothing of the rows is stored in bfloat16, forward or backward.
Legend: N tokens, K choices, M rows, E experts, D width in, F width out.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, grouped_matmul, permute
from pallas_kernels.permute import Plan
from pallas_kernels.quantize import ACTIVATION_FLOOR


def product_of_tokens(
  x: jax.Array, weights: jax.Array, plan: Plan, *, impl: str | None = None
) -> jax.Array:
  """Returns grouped_matmul(permute(x), weights, float8=True), to the bit.

  Args:
    x: [N D] tokens.
    weights: [E D F]; D and F are multiples of 128.
    plan: from `permute.plan`.
    impl: None, 'reference' or 'gpu', as in permute_fp8 and grouped_matmul.

  Returns:
    [M F] of x.dtype, differentiable in x and weights.

  Raises:
    ValueError: widths that 128 doesn't divide, or that differ.
    NotImplementedError: impl='gpu' for a shape that a kernel can't take.
  """
  if weights.shape[1] != x.shape[1]:
    raise ValueError(
      f'x {list(x.shape)} and weights {list(weights.shape)} disagree on the'
      f' width: {x.shape[1]} and {weights.shape[1]}'
    )
  for width in weights.shape[1:]:
    if width % 128:
      raise ValueError(f'float8: width {width} is not a multiple of 128')
  return _product(x, weights, plan, dispatch.chosen(impl))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(
  x: jax.Array, weights: jax.Array, plan: Plan, impl: str | None
) -> jax.Array:
  """Returns the product [M F]."""
  return _fwd(x, weights, plan, impl)[0]


def _fwd(
  x: jax.Array, weights: jax.Array, plan: Plan, impl: str | None
) -> tuple:
  """Returns the product, and the operands in float8 for the backward pass."""
  how = {'power_of_two': True, 'floor': ACTIVATION_FLOOR, 'impl': impl}
  rows = permute.permute_fp8(x, plan, **how)
  layout = plan.block_expert, plan.used
  out, w = grouped_matmul.float8_product(
    rows, weights, *layout, False, x.dtype, impl
  )
  like = jnp.zeros((), weights.dtype)
  return out, (rows, w, plan, like, jnp.zeros((0, *x.shape[1:]), x.dtype))


def _bwd(impl: str | None, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of tokens and weights."""
  rows, w, plan, like, kind = saved
  kept = rows, w, plan.block_expert, plan.used, like
  drows, dweights, *_ = grouped_matmul.float8_gradients(False, impl, kept, grad)
  # Of a linear map: where it is taken is of no account.
  x = jnp.zeros((plan.slot.shape[0], *kind.shape[1:]), kind.dtype)
  turn = lambda x: permute.permute(x, plan, impl=impl)
  (dx,) = jax.vjp(turn, x)[1](drows)
  return dx, dweights, None


_product.defvjp(_fwd, _bwd)
