"""Reads from a compiled schedule which collectives run beside compute.

A scheduled program lists instructions in the order in which they are issued.
An asynchronous collective is begun in one place and awaited in another; what
stands between runs beside it. Two clocks go through that list, one of compute
and one of the link: an instruction takes its FLOPs at the peak or its bytes at
the memory's bandwidth, whichever is longer, a collective what one device sends
at the link's rate, and where a result is awaited before it is there, the wait
is exposed. Compute takes longer than that, so the exposed share is an upper
bound for a link that keeps its rate. A Pallas kernel counts by its bytes alone.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from deepseek_jax.plan.compiled_collectives import (
  KINDS,
  SHAPE,
  Array,
  Collective,
  calls,
  computations,
  one_collective,
)

_LINE = re.compile(
  r'^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+)'
  r' (?P<op>[a-z][\w\-]*)\((?P<given>[^)]*)\)'
)
_NAME = re.compile(r'%([\w.\-]+)')
_CONTRACTED = re.compile(
  r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)[}\]]'
)
_SCOPE = re.compile(r'\b((?:dispatch|combine)(?:_gradient)?)\b')
# What takes no time: names of what is there already.
_FREE = (
  'bitcast',
  'constant',
  'get-tuple-element',
  'parameter',
  'partition-id',
  'tuple',
)


class Rates(NamedTuple):
  """Holds what a device does per second.

  Attributes:
    flops: of products.
    memory: bytes.
    link: bytes to other devices, all collectives together.
  """

  flops: float
  memory: float
  link: float


class Timed(NamedTuple):
  """Holds a collective of a schedule, in all runs of a step.

  Attributes:
    collective: what it moves.
    scope: 'dispatch', 'combine', either's '..._gradient', or '' for others.
    asynchronous: whether other instructions can run beside it.
    wire: seconds on the link.
    exposed: seconds of these in which nothing is computed.
  """

  collective: Collective
  scope: str
  asynchronous: bool
  wire: float
  exposed: float


class _Instruction(NamedTuple):
  """Holds a line of a computation."""

  name: str
  op: str
  arrays: tuple[Array, ...]  # of its result
  given: tuple[str, ...]  # names of what it reads
  line: str


@dataclasses.dataclass
class _Clocks:
  """Holds the times until which compute and link are busy, in seconds."""

  compute: float = 0.0
  link: float = 0.0


def schedule(text: str, devices: int, rates: Rates) -> tuple[Timed, ...]:
  """Returns the collectives of a scheduled program, as one device runs them.

  What stands in a branch of a conditional is left out: further rounds of an
  exchange whose first held all rows. A loop counts as often as it runs, if XLA
  knows that, and its first pass stands for all.

  Args:
    text: `compiled.as_text()` of a program for GPUs.
    devices: over which it is compiled.
    rates: of one of them.

  Raises:
    ValueError: the program says of no order.
  """
  if 'is_scheduled=true' not in text.partition('\n')[0]:
    raise ValueError('the program is not scheduled: compile it for a GPU')
  bodies, entry = computations(text)
  made = {name: _instructions(lines) for name, lines in bodies.items()}
  return tuple(_Walk(made, devices, rates).run(entry))


def exposed_share(found: Iterable[Timed]) -> float:
  """Returns the share of the collectives' time in which nothing is computed."""
  found = list(found)
  wire = sum(t.wire for t in found)
  return sum(t.exposed for t in found) / wire if wire else 0.0


class _Walk:
  """Goes through the computations of a program in their order."""

  def __init__(
    self, made: dict[str, list[_Instruction]], devices: int, rates: Rates
  ):
    """Takes the instructions of each computation by its name."""
    self.made, self.devices, self.rates = made, devices, rates
    self.clocks = _Clocks()

  def run(self, name: str, times: int = 1) -> list[Timed]:
    """Returns the collectives of one pass, each counted `times`."""
    out, begun = [], {}
    shapes = {one.name: one.arrays for one in self.made[name]}
    for one in self.made[name]:
      if one.op in ('while', 'call'):
        out += self._called(one, times)
        continue
      if one.op.removesuffix('-done') in KINDS and one.op.endswith('-done'):
        out.append(self._awaited(*begun.pop(one.given[0]), True))
        continue
      moved = one_collective(one.line, self.devices)
      if moved is None:
        self.clocks.compute += self._seconds(one, shapes)
      elif moved.devices > 1:
        moved = moved._replace(times=times)
        done = self._sent(moved)
        if one.op.endswith('-start'):
          begun[one.name] = moved, done
        else:
          out.append(self._awaited(moved, done, False))
      elif one.op.endswith('-start'):  # a group of one sends nothing
        begun[one.name] = moved, self.clocks.compute
    return [t for t in out if t.collective.devices > 1]

  def _called(self, one: _Instruction, times: int) -> list[Timed]:
    """Runs the body of a loop or call once; the clock counts every pass."""
    out = []
    for name, often in calls(one.line):
      before = self.clocks.compute
      out += self.run(name, times * (often or 1))
      more = (often or 1) - 1
      self.clocks.compute += more * (self.clocks.compute - before)
      self.clocks.link = max(self.clocks.link, self.clocks.compute)
    return out

  def _sent(self, moved: Collective) -> float:
    """Begins a collective: the time at which it will have arrived."""
    begin = max(self.clocks.compute, self.clocks.link)
    self.clocks.link = begin + self._wire(moved)
    return self.clocks.link

  def _wire(self, moved: Collective) -> float:
    """Returns the seconds on the link of one run."""
    return moved._replace(times=1).sent / self.rates.link

  def _awaited(
    self, moved: Collective, done: float, asynchronous: bool
  ) -> Timed:
    """Waits for a collective: what it took, and what of that is exposed."""
    wait = max(0.0, done - self.clocks.compute)
    self.clocks.compute += wait
    scope = _SCOPE.findall(moved.source)
    return Timed(
      moved,
      scope[-1] if scope else '',
      asynchronous,
      moved.times * self._wire(moved),
      moved.times * wait,
    )

  def _seconds(self, one: _Instruction, shapes: dict) -> float:
    """Returns the least time of an instruction that computes."""
    if one.op in _FREE or one.op.endswith(('-start', '-done', 'conditional')):
      return 0.0
    read = [shapes.get(name, ()) for name in one.given]
    moved = sum(a.bits for arrays in (*read, one.arrays) for a in arrays) / 8
    flops = _flops(one, shapes)
    if one.op == 'fusion':
      for name, _ in calls(one.line):
        inner = {i.name: i.arrays for i in self.made.get(name, ())}
        flops += sum(_flops(i, inner) for i in self.made.get(name, ()))
    return max(flops / self.rates.flops, moved / self.rates.memory)


def _flops(one: _Instruction, shapes: dict) -> int:
  """Returns the FLOPs of a product; 0 for anything else."""
  contracted = _CONTRACTED.search(one.line)
  if contracted is None or not one.given or not shapes.get(one.given[0]):
    return 0
  dims = [int(d) for d in re.findall(r'\d+', contracted.group(1))]
  left = shapes[one.given[0]][0].shape
  return 2 * math.prod(one.arrays[0].shape) * math.prod(left[d] for d in dims)


def _instructions(lines: list[str]) -> list[_Instruction]:
  """Returns what the lines of a computation do."""
  out = []
  for line in lines:
    found = _LINE.match(line)
    if found:
      arrays = tuple(
        Array(dtype, tuple(int(d) for d in dims.split(',') if d))
        for dtype, dims in SHAPE.findall(found['type'])
      )
      given = tuple(_NAME.findall(found['given']))
      out.append(_Instruction(found['name'], found['op'], arrays, given, line))
  return out
