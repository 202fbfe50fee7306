"""Picks the code that computes an idea: XLA's of its layer, or a kernel.

`compute.kernels` forces the kernels ('gpu', 'tpu') or their references; None
takes a kernel on a Hopper GPU or a TPU, wherever there is one that supports the
shapes, and the layer's own code for the rest, with reason and shapes logged
once; 'cudnn' does, too, and puts that library before a kernel. On a mesh a
kernel runs on every device for its shard: the partitioner can't look into one.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import sharding
from pallas_kernels import dispatch, target

Axes = tuple[str | None, ...]


@contextlib.contextmanager
def using(impl: str | None, dtype: str = 'bfloat16') -> Iterator[None]:
  """Makes operations inside take `impl`, as `compute.kernels` says.

  Says once that kernels of tensor cores don't compute in float32.

  Args:
    impl: None, 'reference', 'gpu', 'tpu' or 'cudnn'.
    dtype: of the model's products.
  """
  device = target.current()
  picks = impl in (None, 'cudnn')
  if dtype == 'float32' and picks and device.platform == 'cuda':
    dispatch.say_once(
      logging.WARNING,
      'compute.dtype',
      f'float32 on {device}: no kernel for tensor cores takes it, so XLA'
      " computes attention and experts; set compute.dtype='bfloat16'",
    )
  with dispatch.using(impl):
    yield


def pick(
  op: str,
  kernel: Callable[..., Any],
  own: Callable[[], Any],
  args: tuple,
  axes: tuple[Axes, ...],
  out: Any,
  *,
  devices: tuple[str, ...] = ('gpu',),
) -> Any:
  """Returns kernel(impl, *args), where it is wanted and possible, or own().

  Args:
    op: name of the operation, for messages.
    kernel: ('reference' or one of `devices`, *args) -> result; raises
      NotImplementedError for what it can't take. On a mesh it gets the shards
      of one device.
    own: the layer's own code, on whole arrays.
    args: trees of arrays.
    axes: for each of args the logical names of its arrays' first axes that a
      mesh may shard; what has none is on all devices.
    out: the same for the tree that kernel returns.
    devices: that it has a kernel for: 'gpu', 'tpu'.
  """
  run = kernel
  if sharding.to_shard():
    run = lambda impl, *args: _on_shards(kernel, impl, args, axes, out)
  one = lambda impl: run(impl, *args)
  return pick_local(op, one, own, args, devices=devices)


def pick_local(
  op: str,
  kernel: Callable,
  own: Callable,
  args: tuple = (),
  *,
  devices: tuple[str, ...] = ('gpu',),
) -> Any:
  """Returns what `pick` does, for arrays of one device, as inside shard_map.

  Args:
    op: name of the operation, for messages.
    kernel: 'reference' or one of `devices` -> result; raises
      NotImplementedError.
    own: the layer's own code.
    args: whose shapes messages tell.
    devices: that it has a kernel for: 'gpu', 'tpu'.
  """
  impl = dispatch.chosen(None)
  if impl in ('reference', 'gpu', *devices):
    return kernel(impl)
  # Without a kernel for the device, dispatch takes the layer's own code.
  functions = {name: functools.partial(kernel, name) for name in devices}
  functions['reference'] = own
  return dispatch.run(op, None, functions, shapes=dispatch.shapes_of(args))


def _on_shards(
  kernel: Callable, impl: str, args: tuple, axes: tuple[Axes, ...], out: Any
) -> Any:
  """Returns kernel(impl, *args), computed by every device for its shard."""
  using = sharding.current()
  sizes = {}
  for names, arg in zip(axes, args, strict=True):
    for leaf in jax.tree.leaves(arg):
      sizes |= dict(zip(names, leaf.shape))
  cut = {name: using.over(name, size) for name, size in sizes.items() if name}
  spec = lambda names: PartitionSpec(*(cut.get(n) or None for n in names))
  named = lambda a: (
    isinstance(a, tuple) and all(n is None or isinstance(n, str) for n in a)
  )
  return jax.shard_map(
    lambda *parts: kernel(impl, *parts),
    mesh=using.mesh,
    in_specs=tuple(map(spec, axes)),
    out_specs=jax.tree.map(spec, out, is_leaf=named),
    check_vma=False,
  )(*args)
