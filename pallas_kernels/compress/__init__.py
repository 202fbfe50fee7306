"""Compresses windows of tokens to one entry each (DeepSeek-V4 section 2.3).

An entry is a weighted sum of its window's tokens, with weights of its own for
each channel: a softmax over the window of gates, to which a bias is added by
place. With two series an entry draws on the window before, too, through the
first; the second is its own window's. Each (token, series) belongs to at most
one entry, so gradients have one writer: no atomics, same bits every run.
Legend: B batch, L tokens, S entries, m tokens of a window, J series (1 or 2),
C channels, R = J m.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.compress import reference

__all__ = ['compress']


def compress(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None = None,
  *,
  impl: str | None = None,
) -> jax.Array:
  """Returns the entries of windows that end at given tokens.

  Args:
    kv: [B L J C] float32, what is summed.
    gate: [B L J C] float32, the logits.
    bias: [m J C] float32, added to the gates by place in a window; what is
      below -1e30 then counts as no token.
    at: [B S] int32, the last token of each entry's window; windows of a row
      have no token in common. Where a window would begin before the row, or
      end behind it, as at -1, there is no entry.
    before: [B S] int32 for J = 2, the last token of the window before; likewise
      -1 where there is none. No two entries have the same.
    impl: None, 'reference' or 'gpu' (float32, C a multiple of 128).

  Returns:
    [B S C] float32, zeros where there is no entry; differentiable in kv, gate
    and bias.

  Raises:
    ValueError: shapes that don't fit each other, or `before` without J = 2.
    NotImplementedError: impl='gpu' for what the kernel can't take.
  """
  _check(kv, gate, bias, at, before)
  bias, m, L = bias.astype(jnp.float32), bias.shape[0], kv.shape[1]
  inside = lambda last: (last >= m - 1) & (last < L)
  there = inside(at)
  at = jnp.where(there, at, -1).astype(jnp.int32)
  if before is not None:
    before = jnp.where(there & inside(before), before, -1).astype(jnp.int32)
  return _compress(kv, gate, bias, at, before, dispatch.chosen(impl))


def _check(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> None:
  """Raises ValueError for shapes that don't fit each other."""
  if kv.ndim != 4 or kv.shape[2] not in (1, 2) or gate.shape != kv.shape:
    raise ValueError(
      f'kv is {list(kv.shape)} and gate {list(gate.shape)}, not both'
      ' [B L J C] of 1 or 2 series'
    )
  if bias.ndim != 3 or bias.shape[1:] != kv.shape[2:]:
    raise ValueError(
      f'bias is {list(bias.shape)}, but kv {list(kv.shape)} asks for [m J C]'
    )
  if at.ndim != 2 or at.shape[0] != kv.shape[0]:
    raise ValueError(
      f'at is {list(at.shape)}, but kv {list(kv.shape)} asks for [B S]'
    )
  if (before is None) != (kv.shape[2] == 1):
    raise ValueError(f'{kv.shape[2]} series: `before` is for two of them')
  if before is not None and before.shape != at.shape:
    raise ValueError(f'before is {list(before.shape)}, at {list(at.shape)}')


def _run(name: str, impl: str | None, *args: Any, variant: str = '') -> Any:
  """Runs the kernel or the reference function of that name."""

  def gpu(*args: Any) -> Any:
    from pallas_kernels.compress import gpu

    return getattr(gpu, name + variant)(*args)

  functions = {'reference': getattr(reference, name + variant), 'gpu': gpu}
  return dispatch.run(name, impl, functions, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _compress(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
  impl: str | None,
) -> jax.Array:
  """Returns the entries; their gradient is `compress_bwd`."""
  return _run('compress', impl, kv, gate, bias, at, before)


def _fwd(*args: Any) -> tuple:
  """Returns the entries, and what the backward pass needs."""
  *args, impl = args
  saved = _run('compress', impl, *args, variant='_saving')
  return saved[0], (*args, saved)


def _bwd(impl: str | None, saved: tuple, grad: jax.Array) -> tuple:
  """Returns the gradients of kv, gate and bias."""
  return *_run('compress_bwd', impl, *saved, grad), None, None


_compress.defvjp(_fwd, _bwd)
