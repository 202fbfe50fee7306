"""Pipeline schedules as data: what each rank does, in order.

1F1B (arXiv:2104.04473) and DualPipe (DeepSeek-V3, arXiv:2412.19437, section
3.2): micro-batches enter a DualPipe from both ends, and a forward and a
backward chunk run mutually overlapped. Legend: P ranks, M micro-batches.
"""

from typing import Literal, NamedTuple

from deepseek_jax.errors import InputError


class Chunk(NamedTuple):
  """Describes one pass of one micro-batch through one rank.

  Attributes:
    kind: F forward, B whole backward, I its input gradient, W its weight
      gradient.
    direction: 0 enters at rank 0, 1 at rank P - 1.
    index: of the micro-batch within its direction.
  """

  kind: Literal['F', 'B', 'I', 'W']
  direction: int
  index: int


Step = tuple[Chunk, ...]  # one chunk, or a forward and a backward overlapped
Schedule = tuple[tuple[Step, ...], ...]  # per rank, its steps in order


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
  """Returns 1F1B: ranks fill the pipe, then alternate forward and backward.

  Raises:
    InputError: ranks or micro_batches below 1.
  """
  _positive(ranks, micro_batches)
  out = []
  for rank in range(ranks):
    ahead = min(ranks - rank - 1, micro_batches)
    order = [('F', i) for i in range(ahead)]
    for i in range(micro_batches - ahead):
      order += [('F', ahead + i), ('B', i)]
    order += [('B', i) for i in range(micro_batches - ahead, micro_batches)]
    out.append(tuple((Chunk(kind, 0, i),) for kind, i in order))
  return tuple(out)


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
  """Returns DualPipe, where half of the micro-batches enters at each end.

  Raises:
    InputError: ranks or micro_batches odd, or fewer than 2 * ranks of these.
  """
  _positive(ranks, micro_batches)
  if ranks % 2 or micro_batches % 2 or micro_batches < 2 * ranks:
    raise InputError(
      f'dualpipe with ranks = {ranks}, micro_batches = {micro_batches}: both'
      ' must be even, and micro_batches at least 2 * ranks'
    )
  return tuple(_dualpipe_rank(ranks, micro_batches, r) for r in range(ranks))


def _positive(ranks: int, micro_batches: int) -> None:
  """Raises InputError unless both numbers are at least 1."""
  if ranks < 1 or micro_batches < 1:
    raise InputError(
      f'ranks = {ranks}, micro_batches = {micro_batches}: must be at least 1'
    )


class _Recorder:
  """Numbers the chunks of a rank as it names them, near direction first."""

  def __init__(self, far_side: bool):
    """Begins a rank's steps; on the far side near means direction 1."""
    self.far_side, self.steps = far_side, []
    self.count, self.waiting = {}, []

  def __call__(self, *chunks: str) -> None:
    """Appends a step of chunks, each a kind and a direction.

    'F0' is the forward of the next micro-batch of the near direction, 'I1' the
    input gradient of the next of the far one, whose weight gradient then waits.
    """
    step = []
    for kind, near in (c for c in chunks):
      direction = int(near) ^ self.far_side
      key = ('B' if kind == 'I' else kind, direction)
      index = self.count.get(key, 0)
      self.count[key] = index + 1
      step.append(Chunk(kind, direction, index))
      if kind == 'I':
        self.waiting.append(step[-1]._replace(kind='W'))
    self.steps.append(tuple(step))

  def weights(self) -> None:
    """Appends the oldest weight gradient that was put off, as a step."""
    self.steps.append((self.waiting.pop(0),))


def _dualpipe_rank(
  ranks: int, micro_batches: int, rank: int
) -> tuple[Step, ...]:
  """Returns the steps of one rank, eight runs that follow each other.

  The far half of the ranks mirrors the near one (DeepSeek-V3, section 3.2).
  """
  half, each = ranks // 2, micro_batches // 2
  near = min(rank, ranks - 1 - rank)
  outside = half - near - 1  # ranks between this one and the middle
  run = _Recorder(far_side=rank >= half)
  # Fill: forward chunks alone, until those from the far end arrive.
  for _ in range(2 * outside):
    run('F0')
  # Forward chunks from both ends.
  for _ in range(near + 1):
    run('F0')
    run('F1')
  for _ in range(outside):
    # Input gradients travel on at once; weight gradients fill the waits.
    run('I1')
    run.weights()
    run('F1')
  # Steady state: a forward and a backward chunk overlapped, in both directions.
  for i in range(each - ranks + near + 1):
    if i == 0 and outside == 0:  # in the middle nothing overlaps yet
      run('F0')
      run('B1')
    else:
      run('F0', 'B1')
    run('F1', 'B0')
  for _ in range(outside):
    # Drain: no forward chunk is left of the near direction.
    run('B1')
    run('F1', 'B0')
  # From halfway on weight gradients are put off, to fill the waits below.
  for i in range(2 * (near + 1)):
    run(('I' if i > near else 'B') + str(1 - i % 2))
  for _ in range(outside):
    run.weights()
    run('I0')
  while run.waiting:
    run.weights()
  return tuple(run.steps)
