"""The collectives of a compiled program, read from its HLO text.

What stands in a loop counts as often as the loop runs, if XLA knows that; what
stands in a branch of a conditional is marked. Bytes are those that one device
sends as a ring does: (n-1)/n of what is gathered, scattered or exchanged, twice
that for an all-reduce, all of a permute.
"""

import collections
import math
import re
from collections.abc import Iterable
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
_SHAPE = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_TRIPS = re.compile(r'known_trip_count.{0,8}?"n":"(\d+)"')
_CALLED = re.compile(
  r'(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Array(NamedTuple):
  """An array of the program."""

  dtype: str  # as XLA names it, 'f32'
  shape: tuple[int, ...]

  @property
  def bits(self) -> int:
    width = _WIDTH.get(self.dtype)
    width = 8 * width if width else int(re.search(r'\d+', self.dtype).group())
    return width * math.prod(self.shape)


class Collective(NamedTuple):
  """One collective of the program.

  Attributes:
    kind: one of KINDS.
    arrays: its results on a device.
    devices: of a group.
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
    """Of the result on a device; of a reduce-scatter, of what is scattered."""
    size = sum(a.bits for a in self.arrays) // 8
    return size * self.devices if self.kind == 'reduce-scatter' else size

  @property
  def sent(self) -> int:
    """Bytes that one device sends in a run of the program."""
    n = self.devices
    if self.kind == 'collective-permute':
      return self.times * self.bytes
    rounds = 2 if self.kind == 'all-reduce' else 1
    return self.times * (rounds * self.bytes * (n - 1) // n)


# mesh['a'=2,'b'=4] {'a','b':(1)2}: groups along some axes or parts of them.
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')
_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")


def _group(line: str, devices: int) -> int:
  """How many devices take part in one group of a collective."""
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


def _collective(line: str, devices: int) -> Collective | None:
  found = _OP.search(line)
  if not found:
    return None
  arrays = [
    Array(dtype, tuple(int(d) for d in dims.split(',') if d))
    for dtype, dims in _SHAPE.findall(found['type'])
  ]
  if found['start'] and found['type'].startswith('('):
    # (inputs, outputs, ...): of these the outputs.
    half = len(arrays) // 2
    arrays = arrays[1:2] if len(arrays) % 2 else arrays[half:]
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(
    found['kind'],
    tuple(arrays),
    _group(line, devices),
    source=source.group(1) if source else '',
  )


def _computations(text: str):
  """Lines of each computation by name, and the entry's name."""
  bodies, entry, lines = {}, None, []
  for line in text.splitlines():
    found = _COMPUTATION.match(line)
    if found:
      lines = bodies.setdefault(found.group(2), [])
      entry = found.group(2) if found.group(1) else entry
    else:
      lines.append(line)
  return bodies, entry


def _calls(line: str):
  """(computation, times or None when unknown) of all that a line runs."""
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
  """The collectives that a compiled program runs on each device.

  Args:
    text: `compiled.as_text()`.
    devices: over which it is compiled.
  """
  bodies, entry = _computations(text)
  out = []

  def walk(name, times, loop, maybe):
    for line in bodies.get(name, ()):
      one = _collective(line, devices)
      if one:
        # A reduction's own computation holds no collective.
        out.append(one._replace(times=times, loop=loop, maybe=maybe))
        continue
      unsure = maybe or ' conditional(' in line
      for called, often in _calls(line):
        walk(called, times * (often or 1), loop or often is None, unsure)

  walk(entry, 1, False, False)
  return tuple(c for c in out if c.devices > 1)


class Total(NamedTuple):
  """Collectives of one kind: how many run, what one device sends."""

  count: int
  sent: int


def totals(found: Iterable[Collective]) -> dict[str, Total]:
  """By kind, the kinds that occur."""
  out = collections.defaultdict(lambda: Total(0, 0))
  for one in found:
    count, sent = out[one.kind]
    out[one.kind] = Total(count + one.times, sent + one.sent)
  return {kind: out[kind] for kind in KINDS if kind in out}
