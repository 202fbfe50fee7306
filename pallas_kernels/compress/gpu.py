"""Windows compressed to entries on Hopper: an entry per warpgroup.

A thread has up to four channels, which share nothing with others, and goes
through a window with a running maximum: tokens are read once. For the gradient
the entries, their largest logits and their sums are kept. There a warpgroup has
some places of a window and goes through every so many entries, so that the bias
and its gradient stay in registers; more programs of the same launch zero the
rows of tokens that belong to no entry.

The norm that follows is left to XLA: inside it would save an array of entries
written and read, and ask for all channels of an entry in one thread block, of
which there are too few where m = 128.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.compress.reference import NONE

_THREADS = 128
_HELD = 32  # numbers of each array that a thread reads at once
_HELD_BACK = 16  # for the gradient, where bias and sums are held, too
_ROWS = 8  # that one program of zeros looks at


class _Blocks(NamedTuple):
  """Describes what a warpgroup holds.

  Attributes:
    vector: channels of a thread.
    slots: places of a window, in each series.
  """

  vector: int
  slots: int

  @property
  def size(self) -> int:
    """Returns the channels of a warpgroup."""
    return _THREADS * self.vector

  @property
  def layout(self) -> Any:
    """Returns how these channels lie in registers."""
    return plgpu.Layout.WG_STRIDED((self.size,), vec_size=self.vector)

  def columns(self) -> pl.Slice:
    """Returns the channels of this program."""
    return pl.ds(lax.axis_index('part') * self.size, self.size)

  def load(self, ref: jax.Ref, *at: jax.Array | int) -> jax.Array:
    """Loads this program's channels of a row."""
    where = (*at, self.columns())
    return compat.load(ref, where, self.layout, optimized=False)


def _blocks(
  kv: jax.Array, gate: jax.Array, bias: jax.Array, held: int
) -> _Blocks:
  """Returns how the work is divided, with `held` numbers a thread.

  Raises:
    NotImplementedError: a width or dtype that the kernel can't take.
  """
  m, J, C = bias.shape
  for dtype in (kv.dtype, gate.dtype):
    if dtype != jnp.float32:
      raise NotImplementedError(f'dtype {dtype}, not float32')
  if C % _THREADS:
    raise NotImplementedError(f'width {C}, not a multiple of {_THREADS}')
  # Wide where a whole window fits so; of long ones there are few, and narrow
  # parts occupy more of the device.
  fits = lambda v: C % (_THREADS * v) == 0 and v * m * J <= held
  vector = next(filter(fits, (4, 2)), 1)
  most = held // (J * vector)
  slots = max(n for n in range(1, most + 1) if m % n == 0)
  return _Blocks(vector, slots)


def compress(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> jax.Array:
  """Returns the entries [B S C].

  Raises:
    NotImplementedError: a width or dtype that the kernel can't take.
  """
  return _forward(kv, gate, bias, at, before, 1)[0]


def compress_saving(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the entries, the largest logits and the sums of exp(logit - it).

  Raises:
    NotImplementedError: a width or dtype that the kernel can't take.
  """
  return _forward(kv, gate, bias, at, before, 3)


def _lasts(at: jax.Array, before: jax.Array | None, L: int) -> jax.Array:
  """Returns the last row of each entry's window in each series, [J B*S]."""
  first = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None] * L
  flat = lambda last: jnp.where(last >= 0, last + first, -1).reshape(-1)
  return jnp.stack([flat(last) for last in (before, at) if last is not None])


def _forward(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
  count: int,
) -> tuple[jax.Array, ...]:
  """Returns `count` of entries, largest logits and sums, each [B S C]."""
  how, (B, L, J, C) = _blocks(kv, gate, bias, _HELD), kv.shape
  E = at.size
  outs = compat.kernel(
    functools.partial(_forward_body, how=how),
    (jax.ShapeDtypeStruct((E, C), jnp.float32),) * count,
    # Entries last: all axes but that one end at 65,535.
    grid={'part': C // how.size, 'entry': E},
  )(
    kv.reshape(B * L, J, C),
    gate.reshape(B * L, J, C),
    bias,
    _lasts(at, before, L),
  )
  return tuple(out.reshape(*at.shape, C) for out in outs)


def compress_bwd(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
  saved: tuple[jax.Array, jax.Array, jax.Array],
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of kv, gate and bias.

  Raises:
    NotImplementedError: a width or dtype that the kernel can't take.
  """
  how, (B, L, J, C) = _blocks(kv, gate, bias, _HELD_BACK), kv.shape
  m, N, E = bias.shape[0], B * L, at.size
  lasts = _lasts(at, before, L)
  steps = (m // how.slots) * (C // how.size)
  # Few numbers a thread leave room for more thread blocks.
  share = 48 // (how.slots * J * how.vector) * compat.num_sms()
  splits = min(E, max(1, share // steps))
  rows = jax.ShapeDtypeStruct((N, J, C), jnp.float32)
  dkv, dgate, parts = compat.kernel(
    functools.partial(_backward_body, how=how),
    (rows, rows, jax.ShapeDtypeStruct((splits, m, J, C), jnp.float32)),
    grid={
      'part': C // how.size,
      'program': splits * (m // how.slots) + pl.cdiv(N, _ROWS),
    },
  )(
    kv.reshape(N, J, C),
    gate.reshape(N, J, C),
    bias,
    lasts,
    _belongs(lasts, m, N),
    *(a.reshape(E, C) for a in (*saved, grad)),
  )
  return dkv.reshape(kv.shape), dgate.reshape(kv.shape), parts.sum(axis=0)


def _belongs(lasts: jax.Array, m: int, rows: int) -> jax.Array:
  """Returns 1 for each row and series of an entry, else 0: [rows J] int32."""
  at = jnp.where(lasts >= 0, lasts, rows + m)[..., None]
  at += jnp.arange(1 - m, 1, dtype=jnp.int32)  # [J E m]
  J = lasts.shape[0]
  series = jnp.arange(J)[:, None, None]
  none = jnp.zeros((rows, J), jnp.int32)
  return none.at[at, series].set(1, mode='drop')


def _is_there(last: jax.Array, size: int) -> jax.Array:
  """Returns whether a window is there, for each channel."""
  return jnp.broadcast_to(last, (size,)) >= 0


def _row(last: jax.Array, slot: jax.Array, m: int) -> jax.Array:
  """Returns the row of a place of a window; 0 stands in for none."""
  return jnp.maximum(last - (m - 1) + slot, 0)


def _sum(values: list[jax.Array]) -> jax.Array:
  """Returns the sum of some vectors."""
  return functools.reduce(lambda a, b: a + b, values)


def _forward_body(
  kv: jax.Ref, gate: jax.Ref, bias: jax.Ref, lasts: jax.Ref, *outs: jax.Ref,
  how: _Blocks,
) -> None:  # fmt: skip
  """Computes channels of one entry."""
  m, J, _ = bias.shape
  entry, columns = lax.axis_index('entry'), how.columns()
  last = [lasts[j, entry] for j in range(J)]
  full = lambda value: compat.full((how.size,), value, how.layout)

  # No entry: zeros, of all that is kept.
  @pl.when(last[-1] < 0)
  def _():
    for out in outs:
      out[entry, columns] = full(0.0)

  @pl.when(last[-1] >= 0)
  def _():
    def step(i: jax.Array, state: tuple) -> tuple:
      top, total, value = state
      logits, values = [], []
      # Load: all of it before any is used.
      for slot in (i * how.slots + k for k in range(how.slots)):
        for j in range(J):
          row, there = _row(last[j], slot, m), _is_there(last[j], how.size)
          logit = how.load(gate, row, j) + how.load(bias, slot, j)
          logits.append(jnp.where(there, logit, full(NONE)))
          values.append(jnp.where(there, how.load(kv, row, j), full(0.0)))
      # Softmax: what was summed so far shrinks as the maximum grows.
      new = functools.reduce(jnp.maximum, logits, top)
      shrink = jnp.exp(top - new)
      weights = [jnp.exp(logit - new) for logit in logits]
      total = total * shrink + _sum(weights)
      products = [w * v for w, v in zip(weights, values)]
      return new, total, value * shrink + _sum(products)

    start = full(NONE), full(0.0), full(0.0)
    top, total, value = lax.fori_loop(0, m // how.slots, step, start)
    for out, kept in zip(outs, (value / total, top, total)):
      out[entry, columns] = kept


def _backward_body(
  kv: jax.Ref, gate: jax.Ref, bias: jax.Ref, lasts: jax.Ref, belongs: jax.Ref,
  out: jax.Ref, top: jax.Ref, total: jax.Ref, grad: jax.Ref,
  dkv: jax.Ref, dgate: jax.Ref, parts: jax.Ref, *, how: _Blocks,
) -> None:  # fmt: skip
  """Computes some places of every so many entries, or zeros rows of none."""
  splits, m, J, _ = parts.shape
  program, columns = lax.axis_index('program'), how.columns()
  work = splits * (m // how.slots)

  @pl.when(program >= work)
  def _():
    # Past the end is the last row again.
    first = (program - work) * _ROWS
    rows = [jnp.minimum(first + i, kv.shape[0] - 1) for i in range(_ROWS)]
    for row in rows:
      for j in range(J):

        @pl.when(belongs[row, j] == 0)
        def _(row=row, j=j):
          zeros = compat.full((how.size,), 0.0, how.layout)
          dkv[row, j, columns] = zeros
          dgate[row, j, columns] = zeros

  @pl.when(program < work)
  def _():
    split = lax.rem(program, splits)
    first = lax.div(program, splits) * how.slots
    places = [(first + k, j) for k in range(how.slots) for j in range(J)]
    biases = [how.load(bias, slot, j) for slot, j in places]

    def one(i: jax.Array, sums: tuple) -> tuple:
      entry = split + i * splits
      last = [lasts[j, entry] for j in range(J)]
      # Load: the tokens, and what is kept of the entry.
      rows = [_row(last[j], slot, m) for slot, j in places]
      gates = [how.load(gate, row, j) for row, (_, j) in zip(rows, places)]
      values = [how.load(kv, row, j) for row, (_, j) in zip(rows, places)]
      kept = [how.load(a, entry) for a in (out, top, total, grad)]
      mean, most, divisor, given = kept
      given = given / divisor
      found = []
      for n in range(len(places)):
        dvalue = jnp.exp(gates[n] + biases[n] - most) * given
        found.append((dvalue, dvalue * (values[n] - mean)))
      # Store: a row has one entry, and so one writer.
      for j in range(J):

        @pl.when(last[j] >= 0)
        def _(j=j):
          for row, (_, series), (dvalue, dlogit) in zip(rows, places, found):
            if series == j:
              dkv[row, j, columns] = dvalue
              dgate[row, j, columns] = dlogit

      nothing = compat.full((how.size,), 0.0, how.layout)
      there = [_is_there(last[j], how.size) for _, j in places]
      return tuple(
        s + jnp.where(here, dlogit, nothing)
        for s, here, (_, dlogit) in zip(sums, there, found)
      )

    count = lax.div(lasts.shape[1] - 1 - split, splits) + 1
    nothing = compat.full((how.size,), 0.0, how.layout)
    sums = lax.fori_loop(0, count, one, (nothing,) * len(places))
    for (slot, j), value in zip(places, sums):
      parts[split, slot, j, columns] = value
