"""Simulates a pipeline schedule that is given as data.

Knows no published formula: every step runs as early as its order and its
inputs allow. Transfers between ranks take no time.
"""

import dataclasses
from typing import NamedTuple

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.pipeline.chunk_orders import Chunk, Schedule, Step


@dataclasses.dataclass(frozen=True)
class Durations:
  """Times of one chunk, in any unit.

  Attributes:
    forward: F.
    backward: B, both gradients.
    weight: W, the part of B that makes weight gradients.
    overlapped: F&B, a forward and a backward run together; F + B by default.
  """

  forward: float = 1.0
  backward: float = 2.0
  weight: float = 1.0
  overlapped: float | None = None

  def __post_init__(self):
    at_least(self, 'durations.', forward=0, backward=0)
    at_least(self, 'durations.', weight=0, overlapped=0)
    if self.weight > self.backward:
      raise InputError(
        f'durations.weight = {self.weight}: must be at most backward ='
        f' {self.backward}'
      )

  @property
  def pair(self) -> float:
    both = self.forward + self.backward
    return both if self.overlapped is None else self.overlapped

  def of(self, step: Step) -> float:
    """How long a step takes."""
    if len(step) == 2:
      return self.pair
    return {
      'F': self.forward,
      'B': self.backward,
      'I': self.backward - self.weight,
      'W': self.weight,
    }[step[0].kind]


class Span(NamedTuple):
  """A step, when and where it ran."""

  rank: int
  start: float
  end: float
  step: Step


@dataclasses.dataclass(frozen=True)
class SimulatedStep:
  """When every chunk of a training step ran on every rank."""

  ranks: int
  spans: tuple[Span, ...]

  @property
  def length(self) -> float:
    """From the first chunk's start to the last one's end."""
    return max(span.end for span in self.spans)

  def idle(self, rank: int) -> float:
    """Time in which `rank` waits, its start and its end included."""
    mine = (s for s in self.spans if s.rank == rank)
    return self.length - sum(s.end - s.start for s in mine)

  @property
  def bubble(self) -> float:
    """The idle time of the rank that waits most."""
    return max(self.idle(rank) for rank in range(self.ranks))


def _needs(chunk: Chunk, rank: int, ranks: int):
  """(rank, chunk) that must be over before `chunk` starts on `rank`."""
  kind, direction, _ = chunk
  onward = -1 if direction else 1
  first, last = (ranks - 1, 0) if direction else (0, ranks - 1)
  if kind == 'F':
    return None if rank == first else (rank - onward, chunk)
  if kind == 'W':
    return rank, chunk._replace(kind='B')
  if rank == last:
    return rank, chunk._replace(kind='F')
  return rank + onward, chunk._replace(kind='B')


def simulate(schedule: Schedule, times: Durations) -> SimulatedStep:
  """Runs every step as early as its order and its inputs allow.

  Raises:
    InputError: the schedule waits for itself, or for a chunk that it lacks.
  """
  ranks = len(schedule)
  over, free, at, spans = {}, [0.0] * ranks, [0] * ranks, []
  moved = True
  while moved:
    moved = False
    for rank, steps in enumerate(schedule):
      while at[rank] < len(steps):
        step = steps[at[rank]]
        needs = [n for c in step if (n := _needs(c, rank, ranks))]
        if not all(n in over for n in needs):
          break
        start = max([free[rank], *(over[n] for n in needs)])
        free[rank] = start + times.of(step)
        for chunk in step:  # an input gradient is all that others wait for
          kind = 'B' if chunk.kind == 'I' else chunk.kind
          over[rank, chunk._replace(kind=kind)] = free[rank]
        spans.append(Span(rank, start, free[rank], step))
        at[rank] += 1
        moved = True
  stuck = [r for r in range(ranks) if at[r] < len(schedule[r])]
  if stuck:
    step = schedule[stuck[0]][at[stuck[0]]]
    raise InputError(f'schedule: rank {stuck[0]} waits forever for {step}')
  return SimulatedStep(ranks, tuple(spans))
