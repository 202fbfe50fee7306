"""Collectives that carry rows to other devices and back, with their gradients.

A `Wire` is static: which devices and which formats; `there` dispatches
rows to where they are computed on, `back` brings results to where they came
from, to be combined. Each is the other's transpose. Buffers are equal blocks
per destination (all_to_all), or one queue per receiver (ragged_all_to_all).
Legend: n devices of a group, N rows of a device that all of them get, M rows
that a device sends, R that it receives, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import formats
from pallas_kernels.quantize import ACTIVATION_FLOOR


class Wire(NamedTuple):
  """Describes which devices exchange rows, and in which formats.

  Attributes:
    axis: mesh axis over which rows travel.
    size: devices of a group, n.
    groups: places on the axis of each group's members; None: all are one.
    dispatch, combine: formats of rows on the way out and on the way back.
    dtype: of rows when they are computed on.
    ragged: rows travel without filler.
    sent, received: M and R.
    floor: no 128 numbers of a token count as smaller in float8, as in
      DeepSeek's kernels. Gradients have none: they shrink with the batch.
  """

  axis: str
  size: int
  groups: tuple[tuple[int, ...], ...] | None
  dispatch: str
  combine: str
  dtype: str
  ragged: bool = False
  sent: int = 0
  received: int = 0
  floor: float = ACTIVATION_FLOOR

  def plain(self) -> 'Wire':
    """Returns the same wire for float32 rows that nothing may round."""
    return self._replace(dispatch='compute', combine='compute', dtype='float32')


class Offsets(NamedTuple):
  """Holds the offsets of `jax.lax.ragged_all_to_all`.

  Each [n] int32. `*_there` are positions at the receiver, chosen by the sender.
  """

  start: jax.Array  # of the rows for each device, here
  size: jax.Array  # how many
  start_there: jax.Array  # where they go, there
  got_start: jax.Array  # where rows of each device lie, here
  got_size: jax.Array  # how many they are
  got_start_there: jax.Array  # where they came from, there


def _blocks(x: jax.Array, wire: Wire) -> jax.Array:
  """Sends block d of x [n * C ...] to device d; the same both ways."""
  groups = wire.groups and [list(g) for g in wire.groups]
  blocks = x.reshape(wire.size, -1, *x.shape[1:])
  moved = jax.lax.all_to_all(blocks, wire.axis, 0, 0, axis_index_groups=groups)
  return moved.reshape(x.shape)


def _ragged(x: jax.Array, o: Offsets, wire: Wire, back: bool) -> jax.Array:
  """Sends the rows of x that the offsets name; [M ...] -> [R ...], or back."""
  rows = wire.sent if back else wire.received
  out = jnp.zeros((rows, *x.shape[1:]), x.dtype)
  order = (o.start, o.size, o.start_there, o.got_size)
  if back:
    order = (o.got_start, o.got_size, o.got_start_there, o.size)
  return jax.lax.ragged_all_to_all(x, out, *order, axis_name=wire.axis)


def move(
  x: jax.Array, offsets: Offsets | tuple, wire: Wire, *, back: bool = False
) -> jax.Array:
  """Moves x [M ...] -> [R ...], or back; gaps are zero. No gradient."""
  if wire.ragged:
    return _ragged(x, offsets, wire, back)
  return _blocks(x, wire)


def _carried(
  x: jax.Array,
  offsets: Offsets | tuple,
  wire: Wire,
  form: str,
  back: bool,
  floor: float = 0.0,
) -> jax.Array:
  """Returns the rows that arrive, which travel in `form`, in wire.dtype."""
  parts = formats.encode(x, form, floor)
  moved = tuple(move(p, offsets, wire, back=back) for p in parts)
  return formats.decode(moved, form, wire.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def there(x: jax.Array, offsets: Offsets | tuple, wire: Wire) -> jax.Array:
  """Dispatches x [M D] -> the rows that come here [R D], in wire.dtype.

  Rows travel in the format of dispatch, their gradients in that of combine.
  """
  with jax.named_scope('dispatch'):
    return _carried(x, offsets, wire, wire.dispatch, False, wire.floor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def back(x: jax.Array, offsets: Offsets | tuple, wire: Wire) -> jax.Array:
  """Returns results [R D] to the senders of their rows [M D], in wire.dtype.

  They travel in the format of combine, their gradients in that of dispatch.
  """
  with jax.named_scope('combine'):
    return _carried(x, offsets, wire, wire.combine, True, wire.floor)


def _there_gradient(
  wire: Wire, offsets: Offsets | tuple, grad: jax.Array
) -> tuple[jax.Array, None]:
  """Returns the gradients of rows to those who dispatched them."""
  with jax.named_scope('dispatch_gradient'):
    return _carried(grad, offsets, wire, wire.combine, True), None


def _back_gradient(
  wire: Wire, offsets: Offsets | tuple, grad: jax.Array
) -> tuple[jax.Array, None]:
  """Returns the gradients of results to those who computed them."""
  with jax.named_scope('combine_gradient'):
    return _carried(grad, offsets, wire, wire.dispatch, False), None


there.defvjp(
  lambda x, offsets, wire: (there(x, offsets, wire), offsets), _there_gradient
)
back.defvjp(
  lambda x, offsets, wire: (back(x, offsets, wire), offsets), _back_gradient
)


def _gather(
  x: jax.Array, wire: Wire, form: str, floor: float = 0.0
) -> jax.Array:
  """Gathers x [N D] over a wire that carries `form`, in wire.dtype."""
  one = lambda p: jax.lax.all_gather(p, wire.axis, tiled=True)
  parts = tuple(map(one, formats.encode(x, form, floor)))
  return formats.decode(parts, form, wire.dtype)


def _scatter(
  x: jax.Array, wire: Wire, form: str, floor: float = 0.0
) -> jax.Array:
  """Sums shares [n N D] over a wire that carries `form`, in float32: [N D]."""
  # Not psum_scatter: it would add up in the format of the wire.
  parts = tuple(_blocks(p, wire) for p in formats.encode(x, form, floor))
  moved = formats.decode(parts, form, jnp.float32)
  summed = moved.reshape(wire.size, -1, *x.shape[1:]).sum(axis=0)
  return summed.astype(wire.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, wire: Wire) -> jax.Array:
  """Gathers x [N D] of all devices -> [n N D], in the format of dispatch."""
  return _gather(x, wire, wire.dispatch, wire.floor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scatter(x: jax.Array, wire: Wire) -> jax.Array:
  """Scatters shares [n N D] -> their float32 sum [N D], cast to wire.dtype.

  Shares travel in the format of combine.
  """
  return _scatter(x, wire, wire.combine, wire.floor)


gather.defvjp(
  lambda x, wire: (gather(x, wire), None),
  lambda wire, _, g: (_scatter(g, wire, wire.combine),),
)
scatter.defvjp(
  lambda x, wire: (scatter(x, wire), None),
  lambda wire, _, g: (_gather(g, wire, wire.dispatch),),
)
