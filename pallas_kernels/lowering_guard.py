"""Stops a kernel from being lowered for a platform that it is not made for.

Left alone, Mosaic fails for a TPU with an empty assertion, and for ROCm it puts
NVIDIA's code into the program, which then fails where it runs.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_op = contextvars.ContextVar('pallas_kernels_op', default='backward pass')
_made_for_cuda = Primitive('made_for_cuda')
_made_for_cuda.def_impl(
  lambda x, **named: jax.jit(lambda x: _made_for_cuda.bind(x, **named))(x)
)
_made_for_cuda.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_made_for_cuda, lambda grad, *_, **__: [grad])
batching.defvectorized(_made_for_cuda)


def _lower(ctx: Any, x: Any, *, op: str) -> list:
  """Returns x; raises ValueError for any platform but CUDA."""
  platforms = ctx.platforms or ctx.module_context.platforms
  wrong = [p for p in platforms if p != 'cuda']
  if wrong:
    raise ValueError(
      f'{op}: its kernel is made for NVIDIA GPUs, but the program is lowered'
      f' for {wrong[0]}; take None (compute.kernels of a model) with that'
      " target (pallas_kernels.target.targeting), or impl='reference', which"
      ' scores all keys at once'
    )
  return [x]


mlir.register_lowering(_made_for_cuda, _lower)


@contextlib.contextmanager
def naming(op: str) -> Iterator[None]:
  """Makes messages about kernels that are called inside name the operation."""
  token = _op.set(op)
  try:
    yield
  finally:
    _op.reset(token)


def guarded(args: tuple) -> tuple:
  """Returns the arguments of a kernel, the first array of them guarded."""
  args = list(args)
  for i, arg in enumerate(args):
    if isinstance(arg, jax.Array) and not isinstance(arg, jax.Ref):
      args[i] = _made_for_cuda.bind(arg, op=_op.get())
      break
  return tuple(args)
