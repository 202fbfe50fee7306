"""Tokens through the SwiGLU experts they go to, in float8.

A token is quantised once for all experts that it goes to, while its rows are
laid out, and the activation, and its gradient, by the kernel that computes it:
no operand of a product is stored in bfloat16 first, but for gradients that come
in.
Legend: N tokens, K choices, M rows, E experts, D width, F width of an expert.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, grouped_matmul, permute
from pallas_kernels.permute import Plan
from pallas_kernels.quantize import ACTIVATION_FLOOR
from pallas_kernels.swiglu_quantize import swiglu_gradient, swiglu_quantize


def experts_of_tokens(
  x: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
  plan: Plan,
  *,
  limit: float | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Returns what each row's expert makes of its token.

  In float32 to the bit grouped_matmul(float8=True) of permute(x), silu(gate) *
  up, and grouped_matmul(float8=True) again; in bfloat16 the activation is
  quantised from float32, without a rounding between.

  Args:
    x: [N D] tokens.
    gate_up: [E D 2F], the gate's columns first; D and F are multiples of 128.
    down: [E F D].
    plan: from `permute.plan`.
    limit: as in grouped_swiglu.
    impl: None, 'reference' or 'gpu', as in permute_fp8 and grouped_matmul.

  Returns:
    [M D] of x.dtype, differentiable in x and weights.

  Raises:
    ValueError: widths that 128 doesn't divide, or that differ.
    NotImplementedError: impl='gpu' for a shape that a kernel can't take.
  """
  E, F, D = down.shape
  if gate_up.shape != (E, D, 2 * F) or x.shape[1] != D:
    raise ValueError(
      f'x {list(x.shape)}, gate_up {list(gate_up.shape)} and down'
      f' {list(down.shape)} disagree on the width or the experts'
    )
  for width in (D, F):
    if width % 128:
      raise ValueError(f'float8: width {width} is not a multiple of 128')
  return _experts(x, gate_up, down, plan, limit, dispatch.chosen(impl))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _experts(
  x: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
  plan: Plan,
  limit: float | None,
  impl: str | None,
) -> jax.Array:
  """Returns the experts' results [M D]."""
  return _fwd(x, gate_up, down, plan, limit, impl)[0]


def _fwd(
  x: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
  plan: Plan,
  limit: float | None,
  impl: str | None,
) -> tuple:
  """Returns the results, and operands in float8 for the backward pass."""
  how = {'power_of_two': True, 'floor': ACTIVATION_FLOOR, 'impl': impl}
  rest = plan.block_expert, plan.used, False, x.dtype, impl
  # Rows of the tokens, [M D], to gate and up, [M 2F].
  rows = permute.permute_fp8(x, plan, **how)
  h, w_in = grouped_matmul.float8_product(rows, gate_up, *rest)
  # Activation [M F], in float8 at once; then down, [M D].
  hidden = swiglu_quantize(h, limit=limit, **how)
  out, w_out = grouped_matmul.float8_product(hidden, down, *rest)
  like = jnp.zeros((), gate_up.dtype), jnp.zeros((), down.dtype)
  kind = jnp.zeros((0, *x.shape[1:]), x.dtype)
  return out, (rows, w_in, h, hidden, w_out, plan, like, kind)


def _bwd(
  limit: float | None, impl: str | None, saved: tuple, grad: jax.Array
) -> tuple:
  """Returns the gradients of tokens and weights."""
  rows, w_in, h, hidden, w_out, plan, like, kind = saved
  layout = plan.block_expert, plan.used
  kept = hidden, w_out, *layout, like[1]
  dhidden, ddown, *_ = grouped_matmul.float8_gradients(False, impl, kept, grad)
  how = {'limit': limit, 'power_of_two': True, 'impl': impl}
  dh, quantized = swiglu_gradient(h, dhidden, **how)
  kept = rows, w_in, *layout, like[0]
  drows, dgate_up, *_ = grouped_matmul.float8_gradients(
    False, impl, kept, dh, quantized
  )
  # Of a linear map: where it is taken is of no account.
  x = jnp.zeros((plan.slot.shape[0], *kind.shape[1:]), kind.dtype)
  turn = lambda x: permute.permute(x, plan, impl=impl)
  (dx,) = jax.vjp(turn, x)[1](drows)
  return dx, dgate_up, ddown, None


_experts.defvjp(_fwd, _bwd)
