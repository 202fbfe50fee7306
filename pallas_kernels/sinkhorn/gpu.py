"""Sinkhorn on Hopper: one token per thread, its matrix in registers.

The matrices come as n * n planes [tokens], so that every sum is an addition of
vectors and nothing is exchanged between threads. The backward kernel runs
forward again, keeps the divisors in shared memory and walks back: with
y = x / d, d = sum(x) + eps, the gradient is dx = (dy - sum(dy y)) / d and x is
y d.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

TOKENS = 128
_LAYOUT = plgpu.Layout.WG_STRIDED((TOKENS,), vec_size=1)


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
  """Returns the normalised matrices [N n n]."""
  _divisors(logits, iterations)
  body = functools.partial(_forward_body, iterations=iterations, eps=eps)
  return _call(body, {}, logits)


def sinkhorn_bwd(
  logits: jax.Array, grad: jax.Array, iterations: int, eps: float
) -> jax.Array:
  """Returns the gradient of the logits [N n n]."""
  body = functools.partial(_backward_body, iterations=iterations, eps=eps)
  divisors = _divisors(logits, iterations)
  return _call(body, {'divisors': divisors}, logits, grad)


def _divisors(logits: jax.Array, iterations: int) -> pl.MemoryRef:
  """Returns shared memory for the divisors, if they fit."""
  shape = (2 * iterations - 1) * logits.shape[-1], TOKENS
  room = compat.SHARED_MEMORY // 4 // TOKENS
  if shape[0] > room:
    raise NotImplementedError(
      f'{iterations} iterations keep {shape[0]} divisors, more than {room}'
    )
  return plgpu.SMEM(shape, jnp.float32)


def _call(
  body: Callable, scratch: dict[str, Any], *arrays: jax.Array
) -> jax.Array:
  """Runs body on planes of TOKENS tokens; arrays and result [N n n]."""
  N, n, _ = arrays[0].shape
  if n > 4:
    raise NotImplementedError(f'{n} streams: more than 4 spill registers')
  whole = -(-N // TOKENS) * TOKENS
  # An entry of all tokens is one vector, so that no sum crosses threads.
  planes = [
    jnp.pad(a.astype(jnp.float32).reshape(N, n * n).T, ((0, 0), (0, whole - N)))
    for a in arrays
  ]
  out = compat.kernel(
    functools.partial(body, n=n),
    jax.ShapeDtypeStruct((n * n, whole), jnp.float32),
    grid={'block': whole // TOKENS},
    scratch=scratch,
  )(*planes)
  return out[:, :N].T.reshape(N, n, n)


def _tokens() -> pl.Slice:
  """Returns the slice of tokens of this thread block."""
  return pl.ds(lax.axis_index('block') * TOKENS, TOKENS)


def _read(planes: jax.Ref) -> tuple[jax.Array, ...]:
  """Loads the n * n entries of each token, a vector each."""
  return tuple(
    compat.load(planes, (i, _tokens()), _LAYOUT, optimized=False)
    for i in range(planes.shape[0])
  )


def _write(planes: jax.Ref, values: Sequence[jax.Array]) -> None:
  """Stores the n * n entries of each token."""
  for i, value in enumerate(values):
    planes[i, _tokens()] = value


def _lines(n: int, axis: int) -> list[list[int]]:
  """Returns the entries of each row (axis 1) or column (axis 0)."""
  at = lambda i, j: i * n + j if axis else j * n + i
  return [[at(i, j) for j in range(n)] for i in range(n)]


def _sum(values: Sequence[jax.Array]) -> jax.Array:
  """Returns the sum of some vectors."""
  return functools.reduce(lambda a, b: a + b, values)


def _softmax(logits: Sequence[jax.Array], n: int) -> list[jax.Array]:
  """Returns the softmax over the rows of each matrix."""
  out = list(logits)
  for line in _lines(n, 1):
    top = functools.reduce(jnp.maximum, [logits[i] for i in line])
    e = [jnp.exp(logits[i] - top) for i in line]
    total = _sum(e)
    for i, value in zip(line, e):
      out[i] = value / total
  return out


def _divide(
  m: Sequence[jax.Array],
  n: int,
  axis: int,
  eps: float,
  keep: Callable = lambda line, divisor: None,
) -> tuple[jax.Array, ...]:
  """Returns m with each line of that axis divided by its sum + eps."""
  out = list(m)
  for number, line in enumerate(_lines(n, axis)):
    divisor = _sum([m[i] for i in line]) + eps
    keep(number, divisor)
    for i in line:
      out[i] = m[i] / divisor
  return tuple(out)


def _forward_body(
  logits: jax.Ref, out: jax.Ref, *, n: int, iterations: int, eps: float
) -> None:
  """Normalises 128 matrices."""
  # Columns come first and last: they sum to one up to rounding.
  m = [p + eps for p in _softmax(_read(logits), n)]
  m = _divide(m, n, 0, eps)

  def both(_, m: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return _divide(_divide(m, n, 1, eps), n, 0, eps)

  _write(out, lax.fori_loop(0, iterations - 1, both, m))


def _backward_body(
  logits: jax.Ref,
  grad: jax.Ref,
  out: jax.Ref,
  divisors: jax.Ref,
  *,
  n: int,
  iterations: int,
  eps: float,
) -> None:
  """Computes the gradient of 128 matrices of logits."""

  def keep(step: int | jax.Array) -> Callable:
    def store(number: int, divisor: jax.Array) -> None:
      divisors[step * n + number] = divisor

    return store

  # Forward: recomputed, with every divisor kept.
  soft = _softmax(_read(logits), n)
  m = _divide([p + eps for p in soft], n, 0, eps, keep(0))

  def both(k: jax.Array, m: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    m = _divide(m, n, 1, eps, keep(2 * k + 1))
    return _divide(m, n, 0, eps, keep(2 * k + 2))

  m = lax.fori_loop(0, iterations - 1, both, m)

  # Backward: each division undone in turn, which recovers its input.
  def undo(
    step: int | jax.Array,
    axis: int,
    m: Sequence[jax.Array],
    g: Sequence[jax.Array],
  ) -> tuple:
    m, g = list(m), list(g)
    for number, line in enumerate(_lines(n, axis)):
      divisor = compat.load(divisors, step * n + number, _LAYOUT)
      common = _sum([g[i] * m[i] for i in line])
      for i in line:
        g[i] = (g[i] - common) / divisor
        m[i] = m[i] * divisor
    return tuple(m), tuple(g)

  def both_back(i: jax.Array, state: tuple) -> tuple:
    # In reverse: the columns of iteration k, then its rows.
    k = iterations - 2 - i
    return undo(2 * k + 1, 1, *undo(2 * k + 2, 0, *state))

  state = lax.fori_loop(0, iterations - 1, both_back, (m, _read(grad)))
  _, g = undo(0, 0, *state)
  # Of the softmax over rows: p (g - sum(g p)).
  soft = _softmax(_read(logits), n)
  result = list(g)
  for line in _lines(n, 1):
    common = _sum([g[i] * soft[i] for i in line])
    for i in line:
      result[i] = soft[i] * (g[i] - common)
  _write(out, result)
