"""Multiply-adds of the matmuls in a compiled program, read from its HLO text.

XLA's own count takes a loop's body once; here it counts as often as it runs.
A branch that may be skipped counts as if it ran.
"""

import math
import re

from deepseek_jax.plan import compiled_collectives as collectives

_DEFINED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]')
_DOT = re.compile(r' dot\((?:\w+\[[^ ]* )?%?([\w.\-]+)')
_OVER = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def matmuls(text: str) -> int:
  """Of one device, for `compiled.as_text()`."""
  bodies, entry = collectives.computations(text)

  def walk(name: str) -> int:
    total, shapes = 0, {}
    for line in bodies.get(name, ()):
      defined = _DEFINED.match(line)
      if defined:
        shapes[defined.group(1)] = _numbers(defined.group(2))
      dot = _DOT.search(line)
      if dot:
        left = shapes[dot.group(1)]
        over = math.prod(left[i] for i in _numbers(_OVER.search(line)[1]))
        total += over * math.prod(shapes[defined.group(1)])
        continue
      for called, often in collectives.calls(line):
        total += (often or 1) * walk(called)
    return total

  return walk(entry)
