"""Says which axes of a parameter are the inputs and outputs of one matrix.

A parameter keeps its natural rank, [D H K] rather than [D H*K], and may hold
many matrices: one per expert, gate and up, each series of a compressor, each
group of the output projection, each stream's key of an n-gram memory, each
branch of native sparse attention. Muon makes each orthogonal by itself; LoRA
gives each its own low-rank product.
"""

from typing import NamedTuple

# The axis between the two thin matrices of a LoRA product.
RANK = 'rank'
# Axes along which matrices are independent of each other.
_INDEPENDENT = ('experts', 'groups', 'series', 'streams', 'branches')
# Axes up to which a matrix has its inputs, unless they are its outputs.
_INPUTS = ('embed', 'width', RANK)


class Split(NamedTuple):
  """Describes a parameter as matrices: which of its named axes are what."""

  independent: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def split(axes: tuple) -> Split | None:
  """Returns how a parameter with these axis names is made of matrices.

  ('experts', 'embed', None, 'mlp') is gate and up of every expert: matrices
  from embed to mlp. None: it is no matrix, or rows of an n-gram table, of which
  a token reads a few.
  """
  named = [a for a in axes if a is not None]
  if not named or 'tables' in named:
    return None
  independent = [i for i, a in enumerate(axes) if a in _INDEPENDENT]
  if axes[-1] in ('mlp', RANK) and axes[-3:-1] in (
    ('embed', None),
    (RANK, None),
  ):
    independent.append(len(axes) - 2)  # gate and up
  rest = [i for i in range(len(axes)) if i not in independent]
  if len(rest) < 2:
    return None
  ends = [n for n, i in enumerate(rest, start=1) if axes[i] in _INPUTS]
  cut = min(ends[0] if ends else 1, len(rest) - 1)
  return Split(tuple(independent), tuple(rest[:cut]), tuple(rest[cut:]))
