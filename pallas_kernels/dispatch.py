"""Chooses the implementation of an operation: a kernel or the XLA reference.

An operation is {implementation name: function}. `impl=None` takes the kernel
made for the default device ('gpu' on Hopper) and the reference elsewhere; where
the kernel can't take the shapes (no kernel takes an empty array) it falls back
and logs why, once. Inside `using` None is one of IMPLS.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

IMPLS = (None, 'reference', 'gpu')
_log = logging.getLogger('pallas_kernels')
_forced = contextvars.ContextVar('pallas_kernels_impl', default=None)


@functools.cache
def say_once(level: int, op: str, reason: str) -> None:
  """Logs the reason the first time that it comes up for this operation."""
  _log.log(level, '%s: %s', op, reason)


@contextlib.contextmanager
def using(impl: str | None) -> Iterator[None]:
  """Makes operations called inside take impl=None for this one.

  Raises:
    ValueError: `impl` is none of IMPLS.
  """
  if impl not in IMPLS:
    raise ValueError(f"impl={impl!r}; use None, 'reference' or 'gpu'")
  token = _forced.set(impl)
  try:
    yield
  finally:
    _forced.reset(token)


def chosen(impl: str | None) -> str | None:
  """Returns `impl`, or the one that `using` set where it is None.

  An operation asks when it is called: its backward pass is traced later,
  outside of `using`, and has to be the same.
  """
  return _forced.get() if impl is None else impl


def on_hopper() -> bool:
  """Returns whether the default device is a GPU of compute capability 9."""
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    return False
  return str(device.compute_capability).startswith('9')


def _launch(kernel: Callable, args: tuple) -> Any:
  """Returns kernel(*args); raises where an array, and so the grid, is empty."""
  if any(getattr(a, 'size', 1) == 0 for a in jax.tree.leaves(args)):
    raise NotImplementedError('an argument is empty')
  return kernel(*args)


def run(
  op: str,
  impl: str | None,
  implementations: Mapping[str, Callable],
  *args: Any,
) -> Any:
  """Returns the result of one of the implementations for `args`.

  Args:
    op: name of the operation, for messages.
    impl: a name forces that implementation; None picks by device and shape.
    implementations: function by name. 'reference' is required and takes
      everything; every other raises NotImplementedError, with the reason, for
      what it can't take. 'gpu' is the one that None picks on a Hopper GPU.
    *args: passed on.

  Raises:
    ValueError: `impl` is neither None nor one of the names.
    NotImplementedError: the forced implementation can't take these arguments.
  """
  impl, reference = chosen(impl), implementations['reference']
  if impl is not None and impl not in implementations:
    *names, last = [None, *implementations]
    names = ', '.join(map(repr, names))
    raise ValueError(f'{op}: impl={impl!r}; use {names} or {last!r}')
  if impl == 'reference':
    return reference(*args)
  if impl is not None:
    try:
      return _launch(implementations[impl], args)
    except ValueError as error:
      # Pallas names its own mode, not what was asked for.
      if 'interpret mode' not in str(error):
        raise
      raise NotImplementedError(
        f'{op}: impl={impl!r} needs a Hopper GPU, and the device is'
        f" {jax.default_backend()}; use None or 'reference'"
      ) from None
  reason = None
  if not on_hopper():
    reason = 'the default device is not a Hopper GPU'
  elif 'gpu' not in implementations:
    reason = 'there is no kernel for Hopper GPUs'
  if reason:
    say_once(logging.INFO, op, f'reference in use: {reason}')
    return reference(*args)
  try:
    return _launch(implementations['gpu'], args)
  except NotImplementedError as error:
    say_once(logging.WARNING, op, f'reference in use: {error}')
    return reference(*args)
