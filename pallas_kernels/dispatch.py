"""Chooses the implementation of an operation: a kernel or the XLA reference.

An operation is {implementation name: function}. `impl=None` takes the kernel
made for the target ('gpu' on Hopper, 'tpu' on a TPU; see `target`) and the
reference elsewhere; where the kernel can't take the shapes (no kernel takes an
empty array) it falls back and logs why, once for each reason and shapes. Few
operations have a kernel for TPUs, so 'tpu' is the reference of the others.
Inside `using` None is one of IMPLS; `recorded` lists what was chosen.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels import lowering_guard, target

IMPLS = (None, 'reference', 'gpu', 'tpu', 'cudnn')
_MADE_FOR = {'gpu': 'Hopper GPU', 'tpu': 'TPU'}
_log = logging.getLogger('pallas_kernels')
_forced = contextvars.ContextVar('pallas_kernels_impl', default=None)
_library = contextvars.ContextVar('pallas_kernels_library', default='')
_record = contextvars.ContextVar('pallas_kernels_record', default=None)


class Choice(NamedTuple):
  """Tells which implementation an operation took.

  Attributes:
    op: the operation.
    impl: 'gpu', 'tpu', 'reference', or another of its own.
    reason: why the reference, where nobody asked for it; else ''.
    shapes: of the arrays, as in 'bfloat16[2,8] int32[2]'.
  """

  op: str
  impl: str
  reason: str
  shapes: str


@functools.cache
def say_once(level: int, op: str, reason: str) -> None:
  """Logs the reason the first time that it comes up for this operation."""
  _log.log(level, '%s: %s', op, reason)


@contextlib.contextmanager
def using(impl: str | None) -> Iterator[None]:
  """Makes operations called inside take impl=None for this one.

  'cudnn' is None with cuDNN before a kernel, where an operation has it.

  Raises:
    ValueError: `impl` is none of IMPLS.
  """
  if impl not in IMPLS:
    raise ValueError(
      f"impl={impl!r}; use None, 'reference', 'gpu', 'tpu' or 'cudnn'"
    )
  library = impl if impl == 'cudnn' else ''
  tokens = _forced.set(None if library else impl), _library.set(library)
  try:
    yield
  finally:
    _forced.reset(tokens[0])
    _library.reset(tokens[1])


def preferred(impl: str) -> str:
  """Returns the library that `using` set, where `impl` is the kernel."""
  return _library.get() or impl if impl == 'gpu' else impl


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
  """Collects the choices made inside, also those of nested operations."""
  choices = []
  token = _record.set(choices)
  try:
    yield choices
  finally:
    _record.reset(token)


def chosen(impl: str | None) -> str | None:
  """Returns `impl`, or the one that `using` set where it is None.

  An operation asks when it is called: its backward pass is traced later,
  outside of `using`, and has to be the same.
  """
  return _forced.get() if impl is None else impl


def on_hopper() -> bool:
  """Returns whether the target is a GPU of compute capability 9."""
  return target.current().is_hopper


def native() -> str:
  """Returns the kernels that the target runs: 'gpu', 'tpu' or ''."""
  if on_hopper():
    return 'gpu'
  return 'tpu' if target.current().platform == 'tpu' else ''


def no_kernel(impl: str) -> str:
  """Returns the reason of an operation without a kernel, 'gpu' or 'tpu'."""
  return f'there is no kernel for {_MADE_FOR[impl]}s'


def shapes_of(args: Any) -> str:
  """Returns the dtypes and shapes of the arrays among the arguments."""
  leaves = jax.tree.leaves(args)
  # A dtype has a shape as well.
  arrays = [a for a in leaves if hasattr(a, 'shape') and hasattr(a, 'dtype')]
  return ' '.join(f'{a.dtype}[{",".join(map(str, a.shape))}]' for a in arrays)


def _note(op: str, impl: str, reason: str, shapes: str) -> None:
  """Adds a choice to the record, where there is one."""
  record = _record.get()
  if record is not None:
    record.append(Choice(op, impl, reason, shapes))


def _launch(op: str, kernel: Callable, args: tuple) -> Any:
  """Returns kernel(*args).

  Raises:
    NotImplementedError: an array, and so the grid, is empty, or the kernel
      can't take the arguments.
  """
  if any(getattr(a, 'size', 1) == 0 for a in jax.tree.leaves(args)):
    raise NotImplementedError('an argument is empty')
  with lowering_guard.naming(op):
    return kernel(*args)


def _forced_launch(op: str, impl: str, kernel: Callable, args: tuple) -> Any:
  """Returns kernel(*args) of the implementation that was asked for.

  Raises:
    NotImplementedError: as `_launch`, or the device can't run the kernel.
  """
  try:
    return _launch(op, kernel, args)
  except ValueError as error:
    # Pallas names its own mode, not what was asked for.
    if 'interpret mode' not in str(error):
      raise
    needed = _MADE_FOR['tpu' if impl == 'tpu' else 'gpu']
    raise NotImplementedError(
      f'{op}: impl={impl!r} needs a {needed}, and the device is'
      f" {jax.default_backend()}; use None or 'reference'"
    ) from None


def run(
  op: str,
  impl: str | None,
  implementations: Mapping[str, Callable],
  *args: Any,
  shapes: str | None = None,
) -> Any:
  """Returns the result of one of the implementations for `args`.

  Args:
    op: name of the operation, for messages.
    impl: a name forces that implementation, 'tpu' the reference where there is
      no such kernel; None picks by target and shape.
    implementations: function by name. 'reference' is required and takes
      everything; every other raises NotImplementedError, with the reason, for
      what it can't take. None picks 'gpu' on a Hopper GPU, 'tpu' on a TPU.
    *args: passed on.
    shapes: of what the functions hold themselves, for messages; by default
      those of `args`.

  Raises:
    ValueError: `impl` is neither None nor one of the names.
    NotImplementedError: the forced implementation can't take these arguments.
  """
  impl, reference = chosen(impl), implementations['reference']
  shapes = shapes_of(args) if shapes is None else shapes
  if impl is not None and impl not in (*implementations, 'tpu'):
    *names, last = [None, *implementations]
    names = ', '.join(map(repr, names))
    raise ValueError(f'{op}: impl={impl!r}; use {names} or {last!r}')
  if impl == 'reference':
    _note(op, impl, '', shapes)
    return reference(*args)
  if impl in implementations:
    out = _forced_launch(op, impl, implementations[impl], args)
    _note(op, impl, '', shapes)
    return out
  kernel, level = impl or native(), logging.INFO
  if not kernel:
    reason = f'the target, {target.current()}, is not a Hopper GPU'
  elif kernel not in implementations:
    reason = no_kernel(kernel)
  else:
    try:
      out = _launch(op, implementations[kernel], args)
    except NotImplementedError as error:
      reason, level = str(error), logging.WARNING
    else:
      # What holds its arrays itself has called an operation, which is noted.
      if args:
        _note(op, kernel, '', shapes)
      return out
  what = f' (for {shapes})' if level == logging.WARNING and shapes else ''
  say_once(level, op, f'reference in use: {reason}{what}')
  _note(op, 'reference', reason, shapes)
  return reference(*args)
