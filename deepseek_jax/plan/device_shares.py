"""Computes how a model lies on a mesh: what a device holds of each parameter.

Sizes follow from the parameters' own axis names and a dict of rules, as in
training. Tokens are split over data, fsdp and expert, a sequence over context,
blocks over stage. Legend: P stages.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import lora
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel.mesh import RULES
from deepseek_jax.pipeline.cut import stage_places

# The order in which --compile=8x4x2 lists sizes.
AXES = ('data', 'fsdp', 'expert', 'tensor', 'context', 'stage')


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Holds sizes of the mesh axes; their product is the number of devices.

  Attributes:
    data, fsdp, expert, tensor, context, stage: as in `MeshConfig`.
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  stage: int = 1

  def __post_init__(self):
    """Raises InputError where a size is below 1."""
    at_least(self, 'mesh.', **dict.fromkeys(AXES, 1))

  @property
  def devices(self) -> int:
    """Returns the number of devices."""
    return math.prod(getattr(self, name) for name in AXES)

  @property
  def batch(self) -> int:
    """Returns the ways that the sequences of a batch are split."""
    return self.data * self.fsdp * self.expert


def mesh_of(sizes: Mapping[str, int] | Mesh | None) -> Mesh:
  """Returns a Mesh from a dict of axis sizes; axes left out are 1."""
  if isinstance(sizes, Mesh):
    return sizes
  for name in sizes or {}:
    if name not in AXES:
      raise InputError(f'mesh.{name}: no such axis; axes are {AXES}')
  return Mesh(**(sizes or {}))


class DeviceShare(NamedTuple):
  """Describes what one device holds of one parameter of one block.

  Attributes:
    name: dotted path.
    elements: on a device.
    whole: without any splitting.
    over: mesh axes that split it.
    routed: a routed expert's.
    matrix: computes in the model's dtype; the others stay float32.
    trained: has gradients and moments; of a model with `lora`, its adapters.
    axes: its logical axes, on which the optimizer's rule depends.
  """

  name: str
  elements: int
  whole: int
  over: tuple[str, ...]
  routed: bool
  matrix: bool
  trained: bool
  axes: tuple


def _share(
  name: str,
  variable: nnx.Variable,
  stack: int,
  mesh: Mesh,
  rules: Mapping,
  kind: str,
  trained: bool,
) -> DeviceShare:
  """Returns the share of a parameter, the first `stack` axes left out."""
  meta = variable.get_metadata()
  axes = meta.get('axes') or ()
  shape = variable.shape[stack:]
  elements, over = 1, []
  for axis, size in zip(axes, shape):
    to = rules.get(axis)
    names = (to,) if isinstance(to, str) else to or ()
    parts = math.prod(getattr(mesh, n) for n in names)
    if size % parts:
      raise InputError(
        f'{name}: its axis {axis!r} of {size} does not divide by mesh.'
        f'{"*".join(names)} = {parts}'
      )
    elements *= size // parts
    over += [n for n in names if getattr(mesh, n) > 1]
  return DeviceShare(
    name,
    elements,
    math.prod(shape),
    tuple(over),
    'experts' in axes,
    not meta.get('full_precision', False) and kind == 'params',
    trained,
    tuple(axes),
  )


def _leaves(
  abstract: Mapping[str, Any], kind: str
) -> Iterator[tuple[str, nnx.Variable]]:
  """Yields (path, variable) of a tree of abstract variables."""
  leaf = lambda v: isinstance(v, nnx.Variable)
  flat = jax.tree_util.tree_flatten_with_path(abstract[kind], is_leaf=leaf)[0]
  for path, variable in flat:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    yield name, variable


def shares(
  config: TransformerConfig, mesh: Mesh, rules: Mapping | None = None
) -> dict[tuple, tuple[DeviceShare, ...]]:
  """Returns what a device holds, by place.

  Places are ('start',), ('block', i) for layer i in order, ('mtp', k) and
  ('end',): the embedding is at the start, final norm and head at the end.

  Raises:
    InputError: names the parameter whose axis a mesh axis does not divide.
  """
  rules = RULES if rules is None else rules
  abstract = build(config).abstract
  out = {}
  for kind in ('params', 'buffers'):
    for name, variable in _leaves(abstract, kind):
      # Blocks are stacked: their first axis is the layer, which no rule shards.
      stack = 1 if name.startswith('segments.') else 0
      path = name.split('.')
      learns = config.lora is None or lora.KEY in path
      trained = kind == 'params' and learns
      made = _share(name, variable, stack, mesh, rules, kind, trained)
      for place in _places(config, path):
        out.setdefault(place, []).append(made)
  return {place: tuple(found) for place, found in out.items()}


def _places(config: TransformerConfig, path: list[str]) -> list[tuple]:
  """Returns places of the parameter at `path`; a stacked one has many."""
  if path[0] == 'embed' or path[:2] == [lora.KEY, 'embed']:
    return [('start',)]
  if path[0] == 'mtp':
    return [('mtp', int(path[1]))]
  if path[0] != 'segments':
    return [('end',)]
  # A segment repeats its blocks in order: each recurs every `step` layers.
  segments = config.segments()
  number, position = int(path[1]), int(path[2])
  first = sum(len(s.blocks) * s.repeat for s in segments[:number])
  step, repeat = len(segments[number].blocks), segments[number].repeat
  return [('block', first + r * step + position) for r in range(repeat)]


def ranks(
  config: TransformerConfig, mesh: Mesh, *, both_ends: bool = False
) -> tuple[tuple, ...]:
  """Returns the places that each pipeline rank holds.

  Args:
    config: a model.
    mesh: its stage axis is the number of ranks.
    both_ends: rank r holds stages r and P - 1 - r (DualPipe).
  """
  runs = stage_places(config, mesh.stage)
  if not both_ends or mesh.stage == 1:
    return runs
  pairs = zip(runs, reversed(runs))
  return tuple(tuple(dict.fromkeys(a + b)) for a, b in pairs)
