"""Compares an operation and its gradients with loops in float64."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check(
  op: Callable, args: Sequence, grad: jax.Array, wanted: Sequence[np.ndarray]
) -> None:
  """Asserts that a value and the gradients of all `args` are the wanted ones.

  Bounds are shares of the greatest: 3e-6 in float32, half a step of bfloat16.

  Args:
    op: of `args`.
    args: arrays.
    grad: of the value.
    wanted: the value, then the gradients, in float64.
  """

  @jax.jit
  def both(*args):
    out, pull = jax.vjp(op, *args)
    return out, *pull(grad)

  found = both(*args)
  for got, want in zip(found, wanted, strict=True):
    bound = 2.0**-8 if got.dtype == jnp.bfloat16 else 3e-6
    error = abs(np.asarray(got, np.float64) - want).max()
    assert error < bound * abs(want).max(), (error, bound, abs(want).max())
  assert found[0].dtype == args[0].dtype
