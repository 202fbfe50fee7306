"""Reads the collectives of a compiled program from its HLO text.

A collective in a loop counts as often as the loop runs, if XLA knows that; one
in a branch of a conditional is marked. Bytes are those that one device sends as
a ring does: (n-1)/n of what is gathered, scattered or exchanged, twice that for
an all-reduce, all of a permute.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
)
_WIDTH = {'pred': 1, 'c64': 8, 'c128': 16}
_KIND = '|'.join(KINDS)
_OP = re.compile(
  rf'= (?P<type>\(.*?\)|\S+) (?P<kind>{_KIND})(?P<start>-start)?\('
)
SHAPE = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_TRIPS = re.compile(r'known_trip_count.{0,8}?"n":"(\d+)"')
_CALLED = re.compile(
  r'(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Array(NamedTuple):
  """Describes an array of the program."""

  dtype: str  # as XLA names it, 'f32'
  shape: tuple[int, ...]

  @property
  def bits(self) -> int:
    """Returns the size of the array in bits."""
    width = _WIDTH.get(self.dtype)
    width = 8 * width if width else int(re.search(r'\d+', self.dtype).group())
    return width * math.prod(self.shape)


class Collective(NamedTuple):
  """Describes one collective of the program.

  Attributes:
    kind: one of KINDS.
    arrays: its results on a device.
    devices: how many form a group.
    times: how often it runs.
    loop: it stands in a loop of unknown length, which counts as one pass.
    maybe: it stands in a branch of a conditional.
    source: which operation it is for, as XLA names it.
  """

  kind: str
  arrays: tuple[Array, ...]
  devices: int
  times: int = 1
  loop: bool = False
  maybe: bool = False
  source: str = ''

  @property
  def bytes(self) -> int:
    """Returns the bytes of the result on a device.

    A reduce-scatter counts what is scattered, its input.
    """
    size = sum(a.bits for a in self.arrays) // 8
    return size * self.devices if self.kind == 'reduce-scatter' else size

  @property
  def sent(self) -> int:
    """Returns the bytes that one device sends in a run of the program."""
    n = self.devices
    if self.kind == 'collective-permute':
      return self.times * self.bytes
    rounds = 2 if self.kind == 'all-reduce' else 1
    return self.times * (rounds * self.bytes * (n - 1) // n)


# mesh['a'=2,'b'=4] {'a','b':(1)2}: groups along some axes or parts of them.
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')
_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")


def _group(line: str, devices: int) -> int:
  """Returns how many devices take part in one group of a collective."""
  found = _MESH.search(line)
  if found:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    over = _AXIS.findall(found.group(2))
    return math.prod(int(part or sizes[name]) for name, part in over)
  found = re.search(r'replica_groups=\[([\d,]+)\]<=', line)
  if found:
    return math.prod(int(d) for d in found.group(1).split(',')[1:])
  found = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  return len(found.group(1).split(',')) if found else devices


def one_collective(line: str, devices: int) -> Collective | None:
  """Returns the collective of a line of HLO, or None."""
  found = _OP.search(line)
  if not found:
    return None
  arrays = [
    Array(dtype, tuple(int(d) for d in dims.split(',') if d))
    for dtype, dims in SHAPE.findall(found['type'])
  ]
  if found['start'] and found['type'].startswith('('):
    # An asynchronous start returns (inputs, outputs, ...): keep the outputs.
    half = len(arrays) // 2
    arrays = arrays[1:2] if len(arrays) % 2 else arrays[half:]
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(
    found['kind'],
    tuple(arrays),
    _group(line, devices),
    source=source.group(1) if source else '',
  )


def computations(text: str) -> tuple[dict[str, list[str]], str | None]:
  """Returns the lines of each computation by name, and the entry's name."""
  bodies, entry, lines = {}, None, []
  for line in text.splitlines():
    found = _COMPUTATION.match(line)
    if found:
      lines = bodies.setdefault(found.group(2), [])
      entry = found.group(2) if found.group(1) else entry
    else:
      lines.append(line)
  return bodies, entry


def calls(line: str) -> Iterator[tuple[str, int | None]]:
  """Yields (computation, times; None if unknown) of all that a line runs."""
  # A while loop runs its body known_trip_count times, if XLA knows it.
  times = 1
  if ' while(' in line:
    found = _TRIPS.search(line)
    times = int(found.group(1)) if found else None
  for name in _CALLED.findall(line):
    yield name, times
  for names in _BRANCHES.findall(line):
    for name in names.split(','):
      yield name.strip().removeprefix('%'), times


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
  """Returns the collectives that a compiled program runs on each device.

  Args:
    text: `compiled.as_text()`.
    devices: over which it is compiled.
  """
  bodies, entry = computations(text)
  out = []

  def walk(name: str, times: int, loop: bool, maybe: bool) -> None:
    for line in bodies.get(name, ()):
      one = one_collective(line, devices)
      if one:
        # A reduction's own computation holds no collective.
        out.append(one._replace(times=times, loop=loop, maybe=maybe))
        continue
      unsure = maybe or ' conditional(' in line
      for called, often in calls(line):
        walk(called, times * (often or 1), loop or often is None, unsure)

  walk(entry, 1, False, False)
  # A group of one device sends nothing.
  return tuple(c for c in out if c.devices > 1)


class Total(NamedTuple):
  """Counts collectives of one kind: how many run, what one device sends."""

  count: int
  sent: int


def totals(found: Iterable[Collective]) -> dict[str, Total]:
  """Returns the totals by kind, of the kinds that occur."""
  out = collections.defaultdict(lambda: Total(0, 0))
  for one in found:
    count, sent = out[one.kind]
    out[one.kind] = Total(count + one.times, sent + one.sent)
  return {kind: out[kind] for kind in KINDS if kind in out}
