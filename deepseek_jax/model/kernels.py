"""Picks the code that computes an idea: XLA's of its layer, or a kernel.

`compute.kernels` forces the kernels ('gpu') or their references; None takes a
kernel on a Hopper GPU, wherever it supports the shapes, and the layer's own
code for the rest, with the reason logged once.
"""

from collections.abc import Callable
from typing import Any

from deepseek_jax.parallel.sharding import in_mesh
from pallas_kernels import dispatch

using = dispatch.using


def pick(op: str, kernel: Callable[[str], Any], own: Callable[[], Any]) -> Any:
  """Returns kernel(impl), where it is wanted and possible, or own().

  Args:
    op: name of the operation, for messages.
    kernel: 'reference' or 'gpu' -> result; raises NotImplementedError for
      what it can't take.
    own: the layer's own code. Arrays sharded over a mesh always go there: the
      partitioner can't look into a kernel.
  """
  return own() if in_mesh() else pick_local(op, kernel, own)


def pick_local(op: str, kernel: Callable, own: Callable) -> Any:
  """Returns what `pick` does, for arrays of one device, as inside shard_map."""
  impl = dispatch.chosen(None)
  if impl is not None:
    return kernel(impl)
  # Without a kernel for the device, dispatch takes the layer's own code.
  functions = {'reference': own, 'gpu': lambda: kernel('gpu')}
  return dispatch.run(op, None, functions)
