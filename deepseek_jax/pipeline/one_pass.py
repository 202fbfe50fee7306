"""Runs one pass over a pipeline's schedule, and holds what is under way in it.

Legend: B sequences, T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import sharding
from deepseek_jax.pipeline.chunk_orders import Chunk
from deepseek_jax.train.step import Shares


class Place(NamedTuple):
  """Names a stage on a rank; in DualPipe a rank has two, a stage two ranks."""

  rank: int
  stage: int


def add(total: Any, more: Any) -> Any:
  """Returns the sum of two trees of arrays."""
  return jax.tree.map(jnp.add, total, more)


class OnePass:
  """Holds a pass over a schedule: what is under way, and what was added up."""

  def __init__(
    self,
    pipeline: Any,
    held: dict[Place, dict],
    micro: Callable[[int, int], dict],
    shares: Shares,
  ):
    """Begins a pass.

    Args:
      pipeline: the Pipeline that runs it.
      held: variables by place, in the compute dtype.
      micro: (direction, index) -> a micro-batch.
      shares: how each counts.
    """
    self.pipeline, self.micro, self.shares = pipeline, micro, shares
    self.held = held
    self.totals = {place: pipeline.zeros(place) for place in pipeline.places}
    self.metrics = {place: [] for place in pipeline.places}
    self._inbox, self._kept = {}, {}

  def step(self, rank: int, chunks: tuple[Chunk, ...]) -> None:
    """Runs a chunk, or a forward and a backward chunk as one program."""
    forward = next((c for c in chunks if c.kind == 'F'), None)
    backward = next((c for c in chunks if c.kind != 'F'), None)
    pipeline, ahead, behind = self.pipeline, None, None
    there, back, total = (), (), None
    if forward:
      ahead = pipeline.place(rank, forward.direction)
      there = self._forward_inputs(ahead, forward)
    if backward:
      behind = pipeline.place(rank, backward.direction)
      back = self._backward_inputs(behind, backward)
      total = None if backward.kind == 'I' else self.totals[behind]
    kind = backward.kind if backward else ''
    program = pipeline.program(ahead, behind, kind)
    with sharding.under(pipeline.using[rank]):
      went, came = program(there, back, total)
    if forward:
      self._went(ahead, forward, went)
    if backward:
      self._came(behind, backward, came)

  def _forward_inputs(self, place: Place, chunk: Chunk) -> tuple:
    """Returns a stage's variables, its stream [B T ...], batch and shares."""
    stream = self._inbox.pop(('F', place, chunk.index), None)
    batch = self.micro(chunk.direction, chunk.index)
    batch = self.pipeline.put(batch, place.rank, 'batch')
    return self.held[place], stream, batch, self.shares

  def _went(self, place: Place, chunk: Chunk, results: tuple) -> None:
    """Keeps what the backward chunk will need, and sends the stream on."""
    stream, kept, metrics = results
    self._kept[place, chunk.index] = (kept,)
    self.metrics[place].append(metrics)
    self._send('F', place, chunk, stream, 1)

  def _backward_inputs(self, place: Place, chunk: Chunk) -> tuple:
    """Returns what the forward chunk kept, and the stream's gradient if any."""
    key = place, chunk.index
    back = self._kept.pop(key)
    if chunk.kind != 'W':
      back = *back, self._inbox.pop(('B', *key), None)
    if chunk.kind == 'I':
      self._kept[key] = back  # for its W
    return back

  def _came(self, place: Place, chunk: Chunk, results: tuple) -> None:
    """Keeps the sum of the gradients, and sends the stream's one back."""
    total, stream = results
    if chunk.kind != 'I':
      self.totals[place] = total
    if chunk.kind != 'W':
      self._send('B', place, chunk, stream, -1)

  def _send(
    self, kind: str, place: Place, chunk: Chunk, stream: Any, onward: int
  ) -> None:
    """Puts a stream or its gradient onto the rank of the stage beside.

    Args:
      kind: 'F' for a stream, 'B' for its gradient.
      place: that sends.
      chunk: that made it.
      stream: [B T ...]; None at the last stage, or at the first for gradients.
      onward: 1 to the next stage, -1 to the one before.
    """
    if stream is None:
      return
    rank = place.rank + (-onward if chunk.direction else onward)
    to = Place(rank, place.stage + onward)
    moved = self.pipeline.put(stream, rank, 'batch', 'seq')
    self._inbox[kind, to, chunk.index] = moved
