"""Moves copies of tokens to other devices and their results back, in rounds.

Legend: N tokens of a device, D model, K chosen, n devices of a group, P copies
of a token, R rows that come to a device, M rows that it sends.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import queues, wires
from deepseek_jax.parallel.wires import Wire
from pallas_kernels import permute


@dataclasses.dataclass(frozen=True)
class Group:
  """Holds what every kind of exchange needs to know; static.

  Attributes:
    cfg: an ExchangeConfig: the kind of exchange, its formats and its buffers.
    compute: (x [N D], experts [N K], weights [N K], gate_up, down) -> [N D].
    axis: mesh axis of the experts; None when they are not sharded.
    size: devices of a group, n.
    everyone: all mesh axes; rounds are begun by all devices or by none.
    groups: of the axis, where only some of its devices exchange.
    choices: how many are real, where tokens are filler in part.
  """

  cfg: Any
  compute: Callable
  axis: str | None
  size: int
  everyone: tuple[str, ...]
  groups: tuple[tuple[int, ...], ...] | None = None
  choices: int | None = None

  def wire(self, dtype: jax.typing.DTypeLike) -> Wire:
    """Returns the wire of the group for rows computed with in `dtype`."""
    cfg = self.cfg
    dtype = jnp.dtype(dtype).name
    return Wire(
      self.axis, self.size, self.groups, cfg.dispatch, cfg.combine, dtype
    )


def share(total: int, parts: int, longest: int, factor: float) -> int:
  """Returns rows of a buffer: `factor` even shares, `longest` at most."""
  return max(1, min(longest, math.ceil(factor * total / parts)))


def _buffers(
  group: Group, wire: Wire, choices: int, total: int, longest: int
) -> tuple[Wire, int]:
  """Returns the wire with its buffer sizes, and the rounds that carry all."""
  n = group.size
  if group.cfg.kind == 'ragged_all_to_all':
    rows = share(total, 1, n * longest, group.cfg.factor)
    wire = wire._replace(ragged=True, sent=choices, received=rows)
    return wire, queues.turns(n * longest, rows)
  rows = share(total, n, longest, group.cfg.factor)
  wire = wire._replace(sent=n * rows, received=n * rows)
  return wire, queues.turns(longest, rows)


class Copies(NamedTuple):
  """Describes the copies of each token; P of them at most.

  Attributes:
    to: [N P] int32 destination, n for nowhere.
    weights: [N P] float32 of the results that come back.
    choices: [N P] int32, how many choices of experts a copy stands for.
    total: copies that a device sends under even loads.
    longest: copies for one destination at most.
  """

  to: jax.Array
  weights: jax.Array
  choices: jax.Array
  total: int
  longest: int


def hop(
  group: Group,
  x: jax.Array,
  copies: Copies,
  load_of: Callable,
  work: Callable,
) -> tuple[jax.Array, jax.Array]:
  """Dispatches copies of tokens, works on them, and combines the results.

  Args:
    group: who exchanges.
    x: [N D].
    copies: of each token.
    load_of: source [M] -> (integers, floats) that travel with the rows; M of
      the source means filler.
    work: (rows, integers, floats) -> (results, how many choices did not fit
      further on). Integers of filler are -1.

  Returns:
    [N D] in the dtype of x, and int32: how many choices did not fit their first
    round.
  """
  to, weights = copies.to, copies.weights
  wire = group.wire(x.dtype)
  wire, rounds = _buffers(group, wire, to.size, copies.total, copies.longest)
  q = queues.queue(to, group.size)
  # Ragged rounds need the lengths of everyone's queues: [n n] counts.
  counts = me = None
  if wire.ragged:
    counts = jax.lax.all_gather(q.count, group.axis)
    me = jax.lax.axis_index(group.axis)

  def one(
    turn: int | jax.Array, x: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    lane = queues.lane(q, wire, turn, counts, me)
    # Dispatch: [N D] -> the rows that come to this device [R D].
    rows = wires.there(permute.permute(x, lane.plan), lane.offsets, wire)
    integers, floats = load_of(lane.plan.source)
    # Empty rows arrive as 0: shifted by one they read as -1, filler.
    move = lambda a: wires.move(a + 1, lane.offsets, wire) - 1
    keep = lambda a: wires.there(a, lane.offsets, wire.plain())
    with jax.named_scope('dispatch'):
      integers = jax.tree.map(move, integers)
    work_on = integers, jax.tree.map(keep, floats)
    y, missed = work(rows, *work_on)
    # Combine: results [R D] -> [M D] in the order they were sent, then [N D].
    y = wires.back(y, lane.offsets, wire)
    here = lane.plan.slot < wire.sent
    return permute.combine(y, weights, lane.plan), missed, here

  y, missed, here = one(0, x, weights)
  missed += jnp.where(here | (to == group.size), 0, copies.choices).sum()
  if rounds == 1 or not group.cfg.dropless:
    return y, missed

  def further(carry: tuple, turn: jax.Array) -> tuple[tuple, None]:
    more = queues.waiting(q, wire, turn, counts)
    # A round has collectives: all devices must take the same branch.
    more = jax.lax.pmax(more.astype(jnp.int32), group.everyone)
    # Recomputed with its condition, or the scan keeps what a round reads once
    # for every round, those not begun too: rows and the experts' weights.
    again = lambda: one(turn, x, weights)[:2]
    none = lambda: (jnp.zeros_like(y), jnp.zeros_like(missed))
    perhaps = lambda more: jax.lax.cond(more > 0, again, none)
    added = jax.checkpoint(perhaps)(more)
    # y adds up in float32, however many rounds there are.
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, added), None

  start = y.astype(jnp.float32), missed
  total, missed = jax.lax.scan(further, start, jnp.arange(1, rounds))[0]
  return total.astype(y.dtype), missed
