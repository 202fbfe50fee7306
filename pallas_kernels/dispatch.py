"""Which implementation of an operation runs: the reference or the GPU kernel.

`impl=None` takes the kernel on a Hopper GPU and the XLA reference elsewhere;
where the kernel can't take the shapes it falls back and says why, once.
"""

import functools
import logging
from collections.abc import Callable

import jax

IMPLS = (None, 'reference', 'gpu')
_log = logging.getLogger('pallas_kernels')


@functools.cache
def _say_once(level: int, op: str, reason: str) -> None:
  _log.log(level, '%s: reference in use: %s', op, reason)


def on_hopper() -> bool:
  """Whether the default device is a GPU of compute capability 9."""
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    return False
  return str(device.compute_capability).startswith('9')


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
  if impl not in IMPLS:
    raise ValueError(f"{op}: impl={impl!r}; use None, 'reference' or 'gpu'")
  if impl == 'reference':
    return reference(*args)
  if impl == 'gpu':
    return gpu(*args)
  if not on_hopper():
    _say_once(logging.INFO, op, 'the default device is not a Hopper GPU')
    return reference(*args)
  try:
    return gpu(*args)
  except NotImplementedError as error:
    _say_once(logging.WARNING, op, str(error))
    return reference(*args)
