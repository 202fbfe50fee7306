"""What a pipeline wastes: the published formulas, and a simulator.

Formulas: DeepSeek-V3 (arXiv:2412.19437) table 2. The simulator runs a schedule
given as data, so it knows nothing of them. Transfers between ranks take no
time in either.
"""

import dataclasses
from typing import NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.plan.schedules import Chunk, Schedule, Step


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
    if not 0 <= self.weight <= self.backward or self.forward < 0:
      raise InputError(f'{self}: needs 0 <= weight <= backward, forward >= 0')

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


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of V3's table 2; multiples are of a pipeline without copies.

  Attributes:
    bubble: idle time of a rank per training step.
    weights: copies of a stage's weights per rank.
    activations: chunks' worth of activations alive on a rank, of which a
      whole micro-batch has `stages`.
  """

  bubble: float
  weights: int
  activations: int


SCHEDULES = ('1f1b', 'zb1p', 'dualpipe', 'dualpipev')


def method(schedule: str, stages: int, times: Durations) -> Method:
  """Bubble and memory of a schedule over `stages` pipeline stages."""
  F, B, W = times.forward, times.backward, times.weight
  if schedule == '1f1b':
    return Method((stages - 1) * (F + B), 1, stages)
  if schedule == 'zb1p':
    return Method((stages - 1) * (F + B - 2 * W), 1, stages)
  if schedule in ('dualpipe', 'dualpipev'):
    if stages % 2:
      raise InputError(f'stages = {stages}: {schedule} needs an even number')
    bubble = (stages // 2 - 1) * (times.pair + B - 3 * W)
    return Method(bubble, 2, stages + 1)
  raise InputError(f'schedule = {schedule!r}: must be one of {SCHEDULES}')


class Span(NamedTuple):
  """A step, when and where it ran."""

  rank: int
  start: float
  end: float
  step: Step


@dataclasses.dataclass(frozen=True)
class Timeline:
  """A simulated training step."""

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


def simulate(schedule: Schedule, times: Durations) -> Timeline:
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
  return Timeline(ranks, tuple(spans))
