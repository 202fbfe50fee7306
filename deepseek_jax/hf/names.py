"""Maps tensors of Hugging Face files to slices of our variables.

Every tensor of a file is one slice of one of our arrays: a layer of a stack,
an expert of its slab, the gate or the up half. So one table of names serves
both directions, loading and saving; a family's record has it (see `families`).
Legend: E experts.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.hf import families
from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.rows import Row
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig

Path = tuple  # of str and int: ('params', 'segments', 0, 0, 'ffn', 'down')


# Tables that old files carry; they follow from the configuration.
DERIVED = ('self_attn.rotary_emb.inv_freq',)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Describes one array of our variables and the tensors that it is made of.

  Attributes:
    path: keys from the root of the variables.
    shape: of ours, stacked layers first.
    axes: logical axis names of all of `shape` (None for the stack).
    full_precision: stays float32 whatever the model's dtype.
    integer: a table of numbers of experts.
    rows: the table lines of its parts: one, or gate and up.
    prefixes: per stacked layer its name in the file; one for no stack.
    stacked: whether `shape` starts with the layers.
  """

  path: Path
  shape: tuple[int, ...]
  axes: tuple
  full_precision: bool
  rows: tuple[Row, ...]
  prefixes: tuple[str, ...]
  stacked: bool
  integer: bool = False

  @property
  def name(self) -> str:
    """Returns the path with dots."""
    return '.'.join(map(str, self.path))

  @property
  def experts(self) -> int | None:
    """Returns E if experts are tensors of their own, else None."""
    return self.shape[self.stacked] if '{e}' in self.rows[0].theirs else None

  @property
  def lead(self) -> int:
    """Returns how many leading axes have a tensor per entry."""
    return self.stacked + (self.experts is not None)

  @property
  def inner(self) -> tuple[int, ...]:
    """Returns the shape of one tensor in our axes, the half axis left out."""
    inner = self.shape[self.lead :]
    if self.rows[0].half is None:
      return inner
    at = self.rows[0].inputs
    return inner[:at] + inner[at + 1 :]

  @property
  def theirs(self) -> tuple[int, ...]:
    """Returns the shape of one tensor in the file."""
    k, inner = self.rows[0].inputs, self.inner
    return (math.prod(inner[k:]), math.prod(inner[:k])) if k else inner

  @property
  def row_multiple(self) -> int:
    """Returns rows of the file's tensor per entry of our first output axis."""
    k, inner = self.rows[0].inputs, self.inner
    return math.prod(inner[k + 1 :]) if k else 1


class Part(NamedTuple):
  """Describes one tensor of a file and where it goes."""

  name: str
  leaf: Leaf
  at: tuple[int, ...]  # indices of the leading axes (layer, expert)
  half: int | None
  row: Row


def parts(
  leaf: Leaf, lead: Sequence[range] | None = None, halves: range | None = None
) -> Iterator[Part]:
  """Yields the tensors of a leaf, or those in ranges of its leading axes.

  Args:
    leaf: the array.
    lead: a range per leading axis; None takes all.
    halves: which of gate 0 and up 1; None takes both.
  """
  full = [range(n) for n in leaf.shape[: leaf.lead]]
  lead = full if lead is None else list(lead)
  layers = lead.pop(0) if leaf.stacked else (None,)
  experts = lead.pop(0) if leaf.experts is not None else (None,)
  for layer in layers:
    for expert in experts:
      for row in leaf.rows:
        if None not in (row.half, halves) and row.half not in halves:
          continue
        at = tuple(i for i in (layer, expert) if i is not None)
        name = leaf.prefixes[layer or 0] + row.theirs.format(e=expert)
        yield Part(name, leaf, at, row.half, row)


def to_theirs(leaf: Leaf, block: np.ndarray) -> np.ndarray:
  """Returns a block of our inner axes as [rows, columns] of the file."""
  k = leaf.rows[0].inputs
  if not k:
    return block
  # Ours is inputs first, a file's matrix outputs first, each side merged.
  n = block.ndim
  block = block.transpose(*range(k, n), *range(k))
  return block.reshape(math.prod(block.shape[: n - k]), -1)


def window(leaf: Leaf, region: Sequence[slice]) -> tuple[slice, slice | None]:
  """Returns rows and columns of the file's tensor that hold a region of ours.

  Columns are None where the tensor is not a matrix of inputs and outputs.
  """
  k, inner = leaf.rows[0].inputs, leaf.inner
  if not k:
    first = region[0] if region else slice(0, 1)
    return first, None
  rows, columns = (
    slice(cut.start * rest, cut.stop * rest)
    for cut, rest in (
      (region[k], leaf.row_multiple),
      (region[0], math.prod(inner[1:k])),
    )
  )
  return rows, columns


def from_theirs(
  leaf: Leaf, block: np.ndarray, region: Sequence[slice]
) -> np.ndarray:
  """Returns the `window` of a region as our block of exactly this region."""
  k, inner = leaf.rows[0].inputs, leaf.inner
  if not k:
    return block[(slice(None), *region[1:])] if region else block
  # Rows split into output axes, columns into input axes.
  block = block.reshape(
    -1, *inner[k + 1 :], block.shape[1] // math.prod(inner[1:k]), *inner[1:k]
  )
  whole = slice(None)  # the first axes are restricted to the region already
  block = block[(whole, *region[k + 1 :], whole, *region[1:k])]
  outputs = len(inner) - k
  return block.transpose(*range(outputs, len(inner)), *range(outputs))


def order(name: str) -> tuple:
  """Sorts names of a file: by layer, numbers by value."""
  return tuple(
    (0, int(p), '') if p.isdigit() else (1, 0, p) for p in name.split('.')
  )


def leaves(
  config: TransformerConfig, family: Family | None = None
) -> list[Leaf]:
  """Returns every array of a model with its tensors, in a fixed order.

  Args:
    config: of the model.
    family: whose names are meant; by default the one that it is written as.

  Raises:
    InputError: no family holds the model, or this one has no name for an array.
  """
  family = families.of(config) if family is None else family
  out = []
  is_variable = lambda v: isinstance(v, nnx.Variable)
  for kind, state in build(config).abstract.items():
    for path, variable in jax.tree.leaves_with_path(state, is_leaf=is_variable):
      path = (kind, *(entry.key for entry in path))
      out.append(_leaf(config, family, path, variable))
  return out


def _leaf(
  config: TransformerConfig, family: Family, path: Path, variable: nnx.Variable
) -> Leaf:
  """Returns a variable with its tensors; InputError where it has no name."""
  below, rows, prefixes, stacked = _place(config, family, path[1:])
  name = '.'.join(map(str, below))
  found = tuple(r for r in rows if r.ours == name)
  if not found:
    shown = '.'.join(map(str, path))
    raise InputError(
      f'{shown}: has no name in Hugging Face files of {family.model_type}; it'
      ' can be saved only as a checkpoint of this library'
    )
  axes = tuple(variable.get_metadata().get('axes'))
  axes = (None,) * (len(variable.shape) - len(axes)) + axes
  full = variable.get_metadata().get('full_precision') or path[0] == 'buffers'
  shape = tuple(variable.shape)
  integer = jnp.issubdtype(variable.dtype, jnp.integer)
  return Leaf(path, shape, axes, bool(full), found, prefixes, stacked, integer)


def _place(
  config: TransformerConfig, family: Family, path: Path
) -> tuple[Path, tuple[Row, ...], tuple[str, ...], bool]:
  """Returns (path below the block, table, prefixes, stacked) of a variable.

  `path` is below the kind, params or buffers.
  """
  names = family.names
  if path[0] == 'segments':
    i, j = path[1:3]
    segments = config.segments()
    first = sum(len(s.blocks) * s.repeat for s in segments[:i]) + j
    width = len(segments[i].blocks)
    # The stack of one block holds every `width`-th layer of its segment.
    layers = range(first, first + width * segments[i].repeat, width)
    prefixes = tuple(map(names.layer_prefix, layers))
    return path[3:], names.block(segments[i].blocks[j]), prefixes, True
  if path[0] == 'mtp':
    prefix = (names.mtp_prefix(config.layers, path[1]),)
    if path[2] == 'block':
      rows = names.block(config.block(config.mtp.block))
      return path[3:], rows, prefix, False
    return path[2:], names.mtp, prefix, False
  return path, names.root, ('',), False
