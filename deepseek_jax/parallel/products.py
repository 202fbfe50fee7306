"""Multiplies activations by weights, in bfloat16 the way that CPUs are fast.

A CPU with AMX adds bfloat16 products up in float32. XLA takes those units where
a product has a float32 result, so there each one is made so and then rounded,
in the backward pass too; elsewhere these are jnp.einsum and `@`.
"""

import functools
import string

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import processor


def einsum(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns jnp.einsum(form, a, b), rounded to their dtype.

  Args:
    form: as 'BTD,DHK->BTHK'; each letter of an operand is in the other one or
      in the result.
    a, b: arrays of one dtype.
  """
  if not _in_float32(a, b):
    return jnp.einsum(form, a, b)
  return _rounded(form, a, b)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a [... N] @ b [N M], rounded to their dtype."""
  if not _in_float32(a, b):
    return a @ b
  lead = string.ascii_lowercase[: a.ndim - 1]
  return _rounded(f'{lead}N,NM->{lead}M', a, b)


def _in_float32(a: jax.Array, b: jax.Array) -> bool:
  """Returns whether products are to be made in float32 and rounded."""
  if not a.dtype == b.dtype == jnp.bfloat16:
    return False
  on_cpu = jax.default_backend() == 'cpu'
  return on_cpu and processor.this().multiplies_bfloat16


def _float32(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the float32 product of bfloat16 arrays."""
  return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes `einsum` into float32; its gradients are products like it."""
  return _float32(form, a, b).astype(a.dtype)


def _rounded_fwd(
  form: str, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Saves the operands."""
  return _rounded(form, a, b), (a, b)


def _rounded_bwd(
  form: str, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of both operands."""
  (a, b), (operands, out) = saved, form.split('->')
  of_a, of_b = operands.split(',')
  one = lambda form, x, y: _float32(form, x, y).astype(grad.dtype)
  return (
    one(f'{out},{of_b}->{of_a}', grad, b),
    one(f'{of_a},{out}->{of_b}', a, grad),
  )


_rounded.defvjp(_rounded_fwd, _rounded_bwd)
