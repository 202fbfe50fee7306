"""Looks up rows of a table: embeddings of tokens, keys of chosen tokens.

The gradient adds up every use of a row. In bfloat16 that sum would stand still
once it is 256 times a summand, and a batch has thousands of line breaks: it is
taken in float32 whatever is computed in (DeepSeek-V3, arXiv:2412.19437, section
3.3: gradients are accumulated in full precision).
Legend: V rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(
  shape: tuple[int, ...], mode: str, table: jax.Array, index: jax.Array
) -> jax.Array:
  """Returns rows of the table; its gradient is summed in float32."""
  del shape
  return table.at[index].get(mode=mode)


def _rows_fwd(
  shape: tuple[int, ...], mode: str, table: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the rows, and their numbers for the backward pass."""
  return _rows(shape, mode, table, index), index


def _rows_bwd(
  shape: tuple[int, ...], mode: str, index: jax.Array, grad: jax.Array
) -> tuple[jax.Array, None]:
  """Adds up the gradients of each row in float32; `grad`'s dtype in the end."""
  total = jnp.zeros(shape, jnp.float32)
  total = total.at[index].add(grad.astype(jnp.float32), mode=mode)
  return total.astype(grad.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def short(a: jax.Array) -> bool:
  """Returns whether a sum of many such numbers needs a wider type."""
  dtype = jnp.result_type(a)
  return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def int32(numbers: jax.typing.ArrayLike) -> jax.Array:
  """Returns integers as int32, none of which becomes another row's number.

  uint8 could not be compared with 256, and 2^32 + 5 would be 5.
  """
  lib = jnp if isinstance(numbers, jax.Array) else np
  numbers = lib.asarray(numbers)
  if numbers.dtype.itemsize > 4:
    numbers = lib.clip(numbers, -(2**31), 2**31 - 1)
  # Of uint32 what is too large is below 0.
  return jnp.asarray(numbers.astype(np.int32))


def rows(
  table: jax.Array,
  index: jax.Array,
  mode: str = 'fill',
  fill: int | None = None,
) -> jax.Array:
  """Returns rows of a table; first derivatives only, but in float32.

  Args:
    table: [V ...].
    index: [...] integers.
    mode: of `at[].get`. 'fill' gives `fill` where no row has that number, be
      it below 0, and no row its gradient; the others are for numbers that are
      known to be rows'.
    fill: for integers; floats are filled with NaN.

  Returns:
    [... ...].
  """
  if mode == 'fill':
    index = int32(index)
    # at[].get counts negative numbers from the end; here they are no row.
    index = jnp.where(index < 0, table.shape[0], index)
  if short(table):
    return _rows(table.shape, mode, table, index)
  return table.at[index].get(mode=mode, fill_value=fill)
