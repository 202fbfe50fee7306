"""Queues of copies of tokens, carried in rounds by bounded buffers.

Copies for one destination form a queue. A round carries the next rows of every
queue, as many as its buffer holds; what is left waits for the next round, so a
small buffer loses nothing and a token's place depends on its order alone.
Legend: N tokens, P copies of a token at most, n destinations, C rows of a
buffer per destination, R rows that a device receives in a ragged round, M rows
of the buffer that it sends.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from deepseek_jax.parallel.wires import Offsets, Wire
from pallas_kernels.permute import Plan


class Queue(NamedTuple):
  """Holds copies by destination, in order of tokens; all int32."""

  to: jax.Array  # [N P] destination; n for nowhere
  rank: jax.Array  # [N P] place in the destination's queue
  order: jax.Array  # [N * P] copies, sorted by destination
  start: jax.Array  # [n] of each queue in `order`
  count: jax.Array  # [n] its length


class Lane(NamedTuple):
  """Describes one round: which copy lies in which row of the buffer."""

  plan: Plan  # slot [N P], source [M]
  offsets: Offsets | tuple  # () when blocks are equal


def queue(to: jax.Array, destinations: int) -> Queue:
  """Returns the queues of the copies `to` [N P] int32, where n means nowhere.

  Raises:
    InputError: N * P * (n + 2) does not fit int32.
  """
  n, C = destinations, to.size
  if C * (n + 2) >= 2**31:
    raise InputError(
      f'{C} copies for {n} devices: more than an exchange can sort; split the'
      ' batch with train.batch.accumulate'
    )
  flat = to.reshape(C)
  # One operand to sort, and the order among equals is the index: stable.
  keys = jnp.sort(flat * C + jnp.arange(C, dtype=jnp.int32))
  order = keys % C
  # Of destinations 0..n and the end: queue d is keys[first[d] : first[d + 1]].
  bounds = jnp.arange(n + 2, dtype=jnp.int32) * C
  first = jnp.searchsorted(keys, bounds).astype(jnp.int32)
  place = jnp.arange(C, dtype=jnp.int32) - first[flat[order]]
  rank = jnp.zeros(C, jnp.int32).at[order].set(place)
  start, count = first[:n], first[1 : n + 1] - first[:n]
  return Queue(to, rank.reshape(to.shape), order, start, count)


def _plan(slot: jax.Array, source: jax.Array, count: jax.Array) -> Plan:
  """Returns the permutation from copies to rows of the buffer, and back.

  Args:
    slot: [N P] int32, the row of each copy; M for none in this round.
    source: [M] int32, the copy in each row; N * P for filler.
    count: [n] int32, copies for each destination.
  """
  return Plan(slot, source, jnp.zeros(1, jnp.int32), count)


def blocks(q: Queue, turn: int | jax.Array, rows: int) -> Lane:
  """Returns round `turn` where block d of the buffer has `rows` for device d.

  Args:
    q: the queues.
    turn: number of the round, from 0.
    rows: C.
  """
  n = q.count.shape[0]
  place = q.rank - turn * rows
  inside = (q.to < n) & (place >= 0) & (place < rows)
  slot = jnp.where(inside, q.to * rows + place, n * rows)
  # Places in each queue that this round carries, past its end too.
  at = turn * rows + jnp.arange(rows)  # [C]
  index = jnp.minimum(q.start[:, None] + at, q.order.shape[0] - 1)
  source = jnp.where(at < q.count[:, None], q.order[index], q.order.shape[0])
  return Lane(_plan(slot, source.reshape(-1), q.count), ())


def ragged(
  q: Queue, turn: int | jax.Array, counts: jax.Array, me: jax.Array, rows: int
) -> Lane:
  """Returns round `turn` of queues that end at their receivers.

  The copies for a device, those of lower devices first, are one virtual queue;
  a round carries `rows` of it.

  Args:
    q: the queues.
    turn: number of the round, from 0.
    counts: [n n] int32 copies: of sender, for receiver.
    me: int32 index of this device in its group.
    rows: R.
  """
  n, M = q.count.shape[0], q.order.shape[0]
  begin = jnp.cumsum(counts, axis=0) - counts  # [sender receiver]
  # Rows low..high of each sender's queue for each receiver travel now.
  low = jnp.clip(turn * rows - begin, 0, counts)
  high = jnp.clip((turn + 1) * rows - begin, 0, counts)
  start = jnp.cumsum(counts, axis=1) - counts  # in the sender's order
  there = begin + low - turn * rows
  offsets = Offsets(
    start=(start + low)[me],
    size=(high - low)[me],
    start_there=jnp.where(high > low, there, 0)[me],
    got_start=jnp.where(high > low, there, 0)[:, me],
    got_size=(high - low)[:, me],
    got_start_there=(start + low)[:, me],
  )
  to = jnp.minimum(q.to, n - 1)
  inside = (q.to < n) & (q.rank >= low[me][to]) & (q.rank < high[me][to])
  slot = jnp.where(inside, q.start[to] + q.rank, M)
  flat = inside.reshape(-1)[q.order]
  source = jnp.where(flat, q.order, M)
  return Lane(_plan(slot, source, q.count), offsets)


def turns(longest: int, rows: int) -> int:
  """Returns the rounds after which nothing can be left."""
  return -(-longest // rows)


def lane(
  q: Queue,
  wire: Wire,
  turn: int | jax.Array,
  counts: jax.Array | None,
  me: jax.Array | None,
) -> Lane:
  """Returns the round `turn` of either kind of buffer.

  `counts` and `me`, see `ragged`, are None where blocks are equal.
  """
  if wire.ragged:
    return ragged(q, turn, counts, me, wire.received)
  return blocks(q, turn, wire.sent // wire.size)


def waiting(
  q: Queue, wire: Wire, turn: int | jax.Array, counts: jax.Array | None
) -> jax.Array:
  """Returns [] bool: whether round `turn` still has rows to carry from here."""
  if wire.ragged:
    return counts.sum(axis=0).max() > turn * wire.received
  return q.count.max() > turn * (wire.sent // wire.size)
