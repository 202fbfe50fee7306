"""Stops a kernel from being lowered for a platform that it is not made for.

Left alone, Mosaic GPU fails for a TPU with an empty assertion, and for ROCm it
puts NVIDIA's code into the program, which then fails where it runs.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_DEVICES = {'cuda': 'NVIDIA GPUs', 'tpu': 'TPUs'}
_op = contextvars.ContextVar('pallas_kernels_op', default='backward pass')
_made_for = Primitive('made_for')
_made_for.def_impl(
  lambda x, **named: jax.jit(lambda x: _made_for.bind(x, **named))(x)
)
_made_for.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_made_for, lambda grad, *_, **__: [grad])
batching.defvectorized(_made_for)


def _lower(ctx: Any, x: Any, *, op: str, platform: str) -> list:
  """Returns x; raises ValueError for any platform but the kernel's."""
  platforms = ctx.platforms or ctx.module_context.platforms
  wrong = [p for p in platforms if p != platform]
  if wrong:
    raise ValueError(
      f'{op}: its kernel is made for {_DEVICES[platform]}, but the program is'
      f' lowered for {wrong[0]}; take None (compute.kernels of a model) with'
      ' that target (pallas_kernels.target.targeting), or'
      " impl='reference', which scores all keys at once"
    )
  return [x]


mlir.register_lowering(_made_for, _lower)


@contextlib.contextmanager
def naming(op: str) -> Iterator[None]:
  """Makes messages about kernels that are called inside name the operation."""
  token = _op.set(op)
  try:
    yield
  finally:
    _op.reset(token)


def guarded(args: tuple, platform: str = 'cuda') -> tuple:
  """Returns the arguments of a kernel, the first array of them guarded.

  Args:
    args: of the kernel.
    platform: that it is made for, 'cuda' or 'tpu'.
  """
  args = list(args)
  for i, arg in enumerate(args):
    if isinstance(arg, jax.Array) and not isinstance(arg, jax.Ref):
      args[i] = _made_for.bind(arg, op=_op.get(), platform=platform)
      break
  return tuple(args)
