"""Which implementation of an operation runs: the reference or the GPU kernel.

`impl=None` takes the kernel on a Hopper GPU and the XLA reference elsewhere;
where the kernel can't take the shapes (no kernel takes an empty array) it falls
back and says why, once. Inside `using` None is one of the two.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable

import jax

IMPLS = (None, 'reference', 'gpu')
_log = logging.getLogger('pallas_kernels')
_forced = contextvars.ContextVar('pallas_kernels_impl', default=None)


@functools.cache
def say_once(level: int, op: str, reason: str) -> None:
  """Logs a reason the first time that it comes up."""
  _log.log(level, '%s: %s', op, reason)


@contextlib.contextmanager
def using(impl: str | None):
  """Operations called inside take impl=None for this one."""
  if impl not in IMPLS:
    raise ValueError(f"impl={impl!r}; use None, 'reference' or 'gpu'")
  token = _forced.set(impl)
  try:
    yield
  finally:
    _forced.reset(token)


def chosen(impl: str | None) -> str | None:
  """`impl`, or what `using` says where it is None.

  An operation asks when it is called: its backward pass is traced later,
  outside of `using`, and has to be the same.
  """
  return _forced.get() if impl is None else impl


def on_hopper() -> bool:
  """Whether the default device is a GPU of compute capability 9."""
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    return False
  return str(device.compute_capability).startswith('9')


def _launch(gpu: Callable, args):
  """gpu(*args), unless an array is empty: no kernel has an empty grid."""
  if any(getattr(a, 'size', 1) == 0 for a in jax.tree.leaves(args)):
    raise NotImplementedError('an argument is empty')
  return gpu(*args)


def run(op: str, impl: str | None, gpu: Callable, reference: Callable, *args):
  """Calls `gpu(*args)` or `reference(*args)`.

  Args:
    op: name of the operation, for messages.
    impl: None picks by device and shape; 'reference' and 'gpu' force.
    gpu: raises NotImplementedError, with the reason, for what it can't take.
    reference: takes everything.
    *args: passed on.

  Raises:
    ValueError: `impl` is none of the three.
    NotImplementedError: 'gpu' was asked for and can't take these arguments.
  """
  impl = chosen(impl)
  if impl not in IMPLS:
    raise ValueError(f"{op}: impl={impl!r}; use None, 'reference' or 'gpu'")
  if impl == 'reference':
    return reference(*args)
  if impl == 'gpu':
    return _launch(gpu, args)
  if not on_hopper():
    reason = 'reference in use: the default device is not a Hopper GPU'
    say_once(logging.INFO, op, reason)
    return reference(*args)
  try:
    return _launch(gpu, args)
  except NotImplementedError as error:
    say_once(logging.WARNING, op, f'reference in use: {error}')
    return reference(*args)
