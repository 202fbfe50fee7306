"""Counts a kernel's work, and makes numbers to do it on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Work:
  """One op on one shape.

  Attributes:
    op: called with the arrays and impl=...
    args: the arrays.
    exact: the same result in higher precision, from the arrays.
    flops: useful floating-point operations.
    moved: bytes that have to be read and written at least.
    naive: other ways to compute it, by name; the plain XLA one is 'xla'.
    libraries: functions that give their own microseconds, by name.
    in_place: what to time instead, (*args, impl=...) -> the last argument
      anew. That one is donated, as a cache is in use.
    speedup: of tensor cores over bfloat16 in these operands' dtype: 2 for
      float8.
    tolerance: errors of a right kernel are at most this, see `worst_error`.
    tokens: of a model's step; its row tells tokens a second.
    plain: `impl` of the contender 'xla' of what works in place.
  """

  op: Callable
  args: tuple
  exact: Callable
  flops: float
  moved: float
  naive: dict[str, Callable]
  libraries: dict[str, Callable] = dataclasses.field(default_factory=dict)
  in_place: Callable | None = None
  speedup: float = 1.0
  tolerance: float = 2.0**-6
  tokens: int = 0
  plain: str = 'reference'


def fresh_keys(count):
  # Fresh numbers in every run.
  return jax.random.split(
    jax.random.key(np.random.SeedSequence().entropy % 2**31), count
  )


def bf16(key, *shape):
  return jax.random.normal(key, shape, jnp.bfloat16)


def nbytes(*arrays):
  return sum(a.size * a.dtype.itemsize for a in arrays)


def in_float32(op):
  """The reference on inputs widened to float32, products in full precision."""

  def run(*args):
    up = lambda a: (
      a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a
    )
    with jax.default_matmul_precision('highest'):
      return op(*jax.tree.map(up, args), impl='reference')

  return run
