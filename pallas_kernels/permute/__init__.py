"""Dispatch of tokens to expert-contiguous rows, and combine.

Each expert's rows start on a block boundary, so a grouped matmul gets blocks
that belong to one expert each. Nothing is dropped, order is stable, and each
result has one writer in both directions and their gradients: no atomics, same
bits every run.
Legend: N tokens, K choices per token, E experts, M rows, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, target
from pallas_kernels.permute import reference
from pallas_kernels.permute.reference import Plan
from pallas_kernels.quantize import ACTIVATION_FLOOR, check_floor

__all__ = ['Plan', 'combine', 'permute', 'permute_fp8', 'plan']


def plan(
  experts: jax.Array, num_experts: int, *, block: int | None = None
) -> Plan:
  """Lays the (token, choice) pairs out by expert, in blocks of one expert.

  Args:
    experts: [N K] int32. `num_experts` (or anything outside 0..E-1) means
      that the choice goes nowhere: padding, or a dropped token.
    num_experts: E.
    block: rows per block; None picks by size and device: on a CPU 32 down to
      1 for decoding, elsewhere 64 or 128.

  Returns:
    Plan of int32 arrays: `slot` [N K], `source` [M], `block_expert`
    [M // block], `counts` [E], and a property, `used` []. M depends on the
    shapes alone.

  Raises:
    ValueError: `experts` is not [N K] of integers, or N*K*(E+1) overflows.
  """
  if experts.ndim != 2 or not jnp.issubdtype(experts.dtype, jnp.integer):
    raise ValueError(
      f'experts is {experts.dtype}{list(experts.shape)}; give int32 [N K]'
    )
  if experts.size * (num_experts + 1) >= 2**31:
    raise ValueError(
      f'experts has {experts.size} choices among {num_experts} experts: '
      'their product must stay under 2**31; split the batch'
    )
  if block is None:
    kernel = dispatch.chosen(None) in ('gpu', 'tpu')
    wide = kernel or target.current().platform != 'cpu'
    block = reference.pick_block(experts.size, num_experts, wide)
  return reference.plan(experts, num_experts, block)


def _run(name: str, impl: str | None, *args: Any) -> Any:
  """Runs the kernel or the reference function of that name."""

  def gpu(*args: Any) -> Any:
    from pallas_kernels.permute import gpu

    return getattr(gpu, name)(*args)

  functions = {'reference': getattr(reference, name), 'gpu': gpu}
  return dispatch.run(name, impl, functions, *args)


def _inside(plan: Plan) -> Plan:
  """Returns the plan; places before the first or past the last are nowhere."""
  M, choices = plan.source.shape[0], plan.slot.size
  here = lambda a, end: jnp.where((a >= 0) & (a < end), a, end)
  return plan._replace(
    slot=here(plan.slot, M), source=here(plan.source, choices)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute(x: jax.Array, plan: Plan, impl: str | None) -> jax.Array:
  """Returns the rows [M D]; its gradient is `permute_bwd`."""
  return _run('permute', impl, x, plan)


_permute.defvjp(
  lambda x, plan, impl: (_permute(x, plan, impl), plan),
  lambda impl, plan, grad: (_run('permute_bwd', impl, grad, plan), None),
)


def permute(x: jax.Array, plan: Plan, *, impl: str | None = None) -> jax.Array:
  """Returns rows [M D] of tokens x [N D]; filler rows are zero.

  It is differentiable in x.
  impl='gpu' takes bfloat16 and float32 with D a multiple of 256, and raises
  NotImplementedError for the rest; so does combine.
  """
  return _permute(x, _inside(plan), dispatch.chosen(impl))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _permute_fp8(
  x: jax.Array, plan: Plan, power_of_two: bool, floor: float, impl: str | None
) -> tuple[jax.Array, jax.Array]:
  """Returns rows and scales; they have no gradient."""
  return _run('permute_fp8', impl, x, plan, power_of_two, floor)


def _no_gradient(*_) -> None:
  """Raises NotImplementedError: rounding has no gradient of its own."""
  raise NotImplementedError(
    'permute_fp8 has no gradient: use it inside a function with its own VJP'
  )


_permute_fp8.defvjp(lambda *args: (_permute_fp8(*args), None), _no_gradient)


def permute_fp8(
  x: jax.Array,
  plan: Plan,
  *,
  power_of_two: bool = False,
  floor: float = ACTIVATION_FLOOR,
  impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns permute(x) in float8 with a scale per 1 x 128 numbers.

  A token is read and quantised once, in registers, for all of its choices:
  2 D bytes of a bfloat16 token in, D + D/32 bytes of each row out.

  Args:
    x: [N D] bfloat16 or float32, D a multiple of 128.
    plan: from `plan`.
    power_of_two: UE8M0 scales, as in quantize.
    floor: no 128 numbers count as smaller, as in quantize.
    impl: None, 'reference' or 'gpu' (D a multiple of 512).

  Returns:
    rows [M D] float8_e4m3fn and scales [M D/128] float32, zero in filler rows;
    what grouped_matmul_fp8 takes. It has no gradient.

  Raises:
    ValueError: D is not a multiple of 128, or floor is negative.
    NotImplementedError: impl='gpu' for another width, or differentiation.
  """
  if x.shape[-1] % 128:
    raise ValueError(f'x is {list(x.shape)}: its width must be 128 * n')
  check_floor(floor)
  impl = dispatch.chosen(impl)
  return _permute_fp8(x, _inside(plan), power_of_two, floor, impl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(
  rows: jax.Array, weights: jax.Array, plan: Plan, impl: str | None
) -> jax.Array:
  """Returns the sums [N D]; its gradient is `combine_bwd`."""
  return _run('combine', impl, rows, weights, plan)


def _combine_bwd(impl: str | None, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of rows and weights."""
  return *_run('combine_bwd', impl, *saved, grad), None


_combine.defvjp(lambda *args: (_combine(*args), args[:3]), _combine_bwd)


def combine(
  rows: jax.Array, weights: jax.Array, plan: Plan, *, impl: str | None = None
) -> jax.Array:
  """Returns y[n] = sum_k weights[n, k] rows[slot[n, k]], summed in float32.

  Args:
    rows: [M D], any float dtype.
    weights: [N K] float. Choices that go nowhere count as zero.
    plan: from `plan`.
    impl: None, 'reference' or 'gpu'.

  Returns:
    [N D] of rows.dtype. Differentiable in rows and weights.
  """
  return _combine(rows, weights, _inside(plan), dispatch.chosen(impl))
