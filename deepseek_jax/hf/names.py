"""Maps tensors of Hugging Face files to slices of our variables.

Every tensor of a file is one slice of one of our arrays: a layer of a stack,
an expert of its slab, the gate or the up half. So one table of names serves
both directions, loading and saving. The families differ in the attention and
FFN that their configuration chooses, not in a table of their own.
Legend: D model, H heads, K head dim, F hidden, E experts, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import own_classes
from deepseek_jax.config import to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.hf.families import v4_names, v32
from deepseek_jax.hf.row import Row
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig

Path = tuple  # of str and int: ('params', 'segments', 0, 0, 'ffn', 'down')


def _swiglu(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a SwiGLU: gate and up are halves of one array."""
  return (
    Row(f'{ours}gate_up', f'{theirs}gate_proj.weight', 1, half=0),
    Row(f'{ours}gate_up', f'{theirs}up_proj.weight', 1, half=1),
    Row(f'{ours}down', f'{theirs}down_proj.weight', 1),
  )


ROOT = (
  Row('embed', 'model.embed_tokens.weight'),
  Row('norm.scale', 'model.norm.weight'),
  Row('head', 'lm_head.weight', 1, fp8=False),
)
NORMS = (
  Row('attention_norm.scale', 'input_layernorm.weight'),
  Row('ffn_norm.scale', 'post_attention_layernorm.weight'),
)
MLA = (
  Row('attention.kv_down', 'self_attn.kv_a_proj_with_mqa.weight', 1),
  Row('attention.kv_norm.scale', 'self_attn.kv_a_layernorm.weight'),
  Row('attention.kv_up', 'self_attn.kv_b_proj.weight', 1),
  Row('attention.out', 'self_attn.o_proj.weight', 2),
)
QUERY = (Row('attention.q_up', 'self_attn.q_proj.weight', 1),)
COMPRESSED_QUERY = (
  Row('attention.q_down', 'self_attn.q_a_proj.weight', 1),
  Row('attention.q_norm.scale', 'self_attn.q_a_layernorm.weight'),
  Row('attention.q_up', 'self_attn.q_b_proj.weight', 1),
)
GQA = (
  Row('attention.q', 'self_attn.q_proj.weight', 1),
  Row('attention.k', 'self_attn.k_proj.weight', 1),
  Row('attention.v', 'self_attn.v_proj.weight', 1),
  Row('attention.out', 'self_attn.o_proj.weight', 2),
)
DENSE = _swiglu('ffn.', 'mlp.')
MOE = (
  Row('ffn.router.weight', 'mlp.gate.weight', 1, fp8=False),
  Row('ffn.router.bias', 'mlp.gate.e_score_correction_bias'),
  *_swiglu('ffn.', 'mlp.experts.{e}.'),
  *_swiglu('ffn.shared.', 'mlp.shared_experts.'),
)
# eh_proj takes [embedding; hidden], which is also the order of `merge`.
MTP = (
  Row('embed_norm.scale', 'enorm.weight'),
  Row('hidden_norm.scale', 'hnorm.weight'),
  Row('merge', 'eh_proj.weight', 1, fp8=False),
  Row('norm.scale', 'shared_head.norm.weight'),
)
# Repeated in every MTP layer of a file; ours are shared with the main model.
MTP_COPIES = {
  'embed_tokens.weight': 'model.embed_tokens.weight',
  'shared_head.head.weight': 'lm_head.weight',
}
# Tables that old files carry; they follow from the configuration.
DERIVED = ('self_attn.rotary_emb.inv_freq',)


def block_rows(block: BlockConfig) -> tuple[Row, ...]:
  """Returns the table of one layer."""
  if isinstance(block.attention, MLAConfig):
    plain = block.attention.q_rank is None
    attention = (*(QUERY if plain else COMPRESSED_QUERY), *MLA)
    if isinstance(block.attention, DSAConfig):
      attention += v32.ROWS
  else:
    attention = GQA
  ffn = MOE if isinstance(block.ffn, MoEConfig) else DENSE
  return (*NORMS, *attention, *ffn)


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


def layer_prefix(index: int) -> str:
  """Returns the prefix of the tensors of layer `index`, counted from 0."""
  return f'model.layers.{index}.'


def mtp_prefix(config: TransformerConfig, depth: int) -> str:
  """Returns the prefix of a depth of multi-token prediction, counted from 0."""
  if v4_names.is_v4(config):
    return v4_names.mtp_prefix(depth)
  return layer_prefix(config.layers + depth)


def order(name: str) -> tuple:
  """Sorts names of a file: by layer, numbers by value."""
  return tuple(
    (0, int(p), '') if p.isdigit() else (1, 0, p) for p in name.split('.')
  )


def leaves(config: TransformerConfig) -> list[Leaf]:
  """Returns every array of a model with its tensors, in a fixed order.

  Raises InputError for an array that the family has no name for, and for a
  user's own class: what it computes is in no family, whatever its arrays.
  """
  for where, kind in own_classes.kinds(to_dict(config)).items():
    raise InputError(
      f'{where} = {kind}: no Hugging Face family has it; it can be saved only'
      ' as a checkpoint of this library'
    )
  out = []
  is_variable = lambda v: isinstance(v, nnx.Variable)
  for kind, state in build(config).abstract.items():
    for path, variable in jax.tree.leaves_with_path(state, is_leaf=is_variable):
      path = (kind, *(entry.key for entry in path))
      out.append(_leaf(config, path, variable))
  return out


def _leaf(
  config: TransformerConfig, path: Path, variable: nnx.Variable
) -> Leaf:
  """Returns a variable with its tensors; InputError where it has no name."""
  below, rows, prefixes, stacked = _place(config, path[1:])
  name = '.'.join(map(str, below))
  found = tuple(r for r in rows if r.ours == name)
  if not found:
    shown = '.'.join(map(str, path))
    raise InputError(
      f'{shown}: has no name in Hugging Face files of this family; it can be'
      ' saved only as a checkpoint of this library'
    )
  axes = tuple(variable.get_metadata().get('axes'))
  axes = (None,) * (len(variable.shape) - len(axes)) + axes
  full = variable.get_metadata().get('full_precision') or path[0] == 'buffers'
  shape = tuple(variable.shape)
  integer = jnp.issubdtype(variable.dtype, jnp.integer)
  return Leaf(path, shape, axes, bool(full), found, prefixes, stacked, integer)


def _place(
  config: TransformerConfig, path: Path
) -> tuple[Path, tuple[Row, ...], tuple[str, ...], bool]:
  """Returns (path below the block, table, prefixes, stacked) of a variable.

  `path` is below the kind, params or buffers.
  """
  v4 = v4_names.is_v4(config)
  root, rows_of, mtp_rows = ROOT, block_rows, MTP
  if v4:
    root, rows_of, mtp_rows = v4_names.ROOT, v4_names.block_rows, v4_names.MTP
  if path[0] == 'segments':
    i, j = path[1:3]
    segments = config.segments()
    first = sum(len(s.blocks) * s.repeat for s in segments[:i]) + j
    width = len(segments[i].blocks)
    # The stack of one block holds every `width`-th layer of its segment.
    layers = range(first, first + width * segments[i].repeat, width)
    prefix_of = v4_names.layer_prefix if v4 else layer_prefix
    prefixes = tuple(map(prefix_of, layers))
    return path[3:], rows_of(segments[i].blocks[j]), prefixes, True
  if path[0] == 'mtp':
    prefix = (mtp_prefix(config, path[1]),)
    if path[2] == 'block':
      rows = rows_of(config.block(config.mtp.block))
      return path[3:], rows, prefix, False
    return path[2:], mtp_rows, prefix, False
  return path, root, ('',), False
