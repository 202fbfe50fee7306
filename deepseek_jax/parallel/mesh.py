"""The mesh of a run: six axes, and rules that lay named axes on them.

Everything that can be wrong is found before anything is compiled: an axis that
does not divide, an unknown name, a mesh that does not fit the devices.
Devices are numbered with stage slowest and tensor fastest, so that the axes
that talk most lie closest together.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.parallel.exchange import ExchangeConfig

AXES = ('stage', 'data', 'fsdp', 'expert', 'context', 'tensor')
# Of parameters ...
RULES = {
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'experts': 'expert',
  'tables': 'fsdp',  # Engram tables; each token reads a few rows
}
# ... and of what a step computes.
ACTIVATIONS = {'batch': ('data', 'fsdp', 'expert'), 'seq': 'context'}

Rules = Mapping[str, str | tuple[str, ...] | None]


def _default_rules() -> dict:
  """Returns the rules of parameters and activations; a new dict each time."""
  return {**RULES, **ACTIVATIONS}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Describes how a run is sharded.

  It changes no number beyond rounding, and may change whenever a run goes on.

  Attributes:
    data: copies of everything, each with its share of a batch.
    fsdp: parameters are sharded, and gathered where they are used.
    expert: experts are sharded; tokens travel to them (see exchange).
    tensor: heads, hidden units and the vocabulary are sharded.
    context: sequences are sharded.
    stage: layers are sharded; a batch passes through as train.batch.accumulate
      micro-batches.
    schedule: in which order, with stage > 1 (see pipeline.chunk_orders).
    rules: logical axis -> the mesh axis or axes that shard it; '' for none.
    exchange: how tokens reach experts of other devices.
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  stage: int = 1
  schedule: Literal['1f1b', 'dualpipe'] = '1f1b'
  rules: dict[str, str | tuple | None] = dataclasses.field(
    default_factory=_default_rules
  )
  exchange: ExchangeConfig = ExchangeConfig()

  def __post_init__(self):
    at_least(self, 'mesh.', **dict.fromkeys(AXES, 1))
    for name, over in self.rules.items():
      for axis in names(over):
        if axis not in AXES:
          raise InputError(
            f'mesh.rules.{name} = {over!r}: no such mesh axis;'
            f' {_nearest(axis, AXES)}'
          )

  @property
  def devices(self) -> int:
    """Counts the devices of the mesh."""
    return math.prod(getattr(self, name) for name in AXES)

  @property
  def spread(self) -> str:
    """Returns the sizes above 1 as 'data=2 * expert=4', for messages."""
    sizes = [(name, getattr(self, name)) for name in AXES]
    return ' * '.join(f'{n}={s}' for n, s in sizes if s > 1) or 'data=1'

  def ways(self, logical: str) -> int:
    """Returns into how many shards the rules split the logical axis."""
    over = names(self.rules.get(logical))
    return math.prod(getattr(self, name) for name in over)


def names(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of a rule; () for None or ''."""
  return (over,) if isinstance(over, str) and over else tuple(over or ())


def _nearest(name: str, known: Iterable[str]) -> str:
  """Returns a hint for a message: the closest known name, or all of them."""
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'did you mean {near[0]}?' if near else f'known: {sorted(known)}'


def make(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns the jax mesh of all six axes.

  Args:
    config: sizes.
    devices: to lay it on; by default the first ones of all there are. Several
      processes must use all.

  Raises:
    InputError: the mesh does not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  fits = config.devices <= len(devices)
  if jax.process_count() > 1:
    fits = config.devices == len(devices)
  if not fits:
    raise InputError(
      f'mesh: {config.spread} makes {config.devices} devices, but there are'
      f' {len(devices)}; change the sizes to make up {len(devices)}'
    )
  shape = [getattr(config, name) for name in AXES]
  grid = np.array(devices[: config.devices]).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def named(
  abstract: dict[str, nnx.State],
) -> Iterable[tuple[str, nnx.Variable, int]]:
  """Yields (dotted name, abstract variable, stacked axes) of a model.

  Variables are the parameters and then the buffers; stacked is how many leading
  axes stand for layers.
  """
  leaf = lambda v: isinstance(v, nnx.Variable)
  for kind in ('params', 'buffers'):
    flat = jax.tree_util.tree_leaves_with_path(abstract[kind], is_leaf=leaf)
    for path, variable in flat:
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      axes = variable.get_metadata().get('axes') or ()
      stacked = len(variable.shape) - len(axes)
      yield name, variable, stacked


def check(config: MeshConfig, abstract: dict[str, nnx.State]) -> None:
  """Checks the rules against a model's parameters.

  Args:
    config: sizes and rules.
    abstract: `Model.abstract`.

  Raises:
    InputError: names the parameter, its axis and the sizes.
  """
  known = set(_default_rules())
  for name, variable, stacked in named(abstract):
    axes = variable.get_metadata().get('axes') or ()
    known |= {a for a in axes if a}
    seen = {}
    for axis, size in zip(axes, variable.shape[stacked:]):
      _check_axis(config, name, axis, size, seen)
  for name in config.rules:
    if name not in known:
      raise InputError(
        f'mesh.rules.{name}: no parameter has such an axis;'
        f' {_nearest(name, known)}'
      )
  _check_activations(config.rules)


def _check_activations(rules: Rules) -> None:
  """Raises InputError if one axis shards tokens and what each consists of."""
  if len(names(rules.get('experts'))) > 1:
    raise InputError(
      f'mesh.rules.experts = {rules["experts"]!r}: must be one mesh axis'
    )
  sharded_by = {}
  for name in ('batch', 'seq'):
    for axis in names(rules.get(name)):
      if axis in sharded_by:
        raise InputError(
          f'mesh.rules.{name} = {rules[name]!r}: mesh.{axis} already shards'
          f' {sharded_by[axis]!r}; name it once'
        )
      sharded_by[axis] = name
  for name in ('heads', 'kv_heads', 'mlp'):
    for axis in names(rules.get(name)):
      if axis in sharded_by:
        raise InputError(
          f'mesh.rules.{name} = {rules[name]!r}: mesh.{axis} shards'
          f' {sharded_by[axis]!r}, so its devices have different tokens; change'
          f' mesh.rules.{name} or mesh.rules.{sharded_by[axis]}'
        )


def _check_axis(
  config: MeshConfig,
  name: str,
  axis: str | None,
  size: int,
  seen: dict[str, str],
) -> None:
  """Raises InputError unless a parameter's axis divides by its mesh axes.

  Args:
    config: sizes and rules.
    name: of the parameter.
    axis: logical name of the axis; None is unsharded.
    size: of the axis.
    seen: mesh axis -> the axis of the same parameter that it shards already;
      this one is added.
  """
  over = names(config.rules.get(axis))
  parts = config.ways(axis)
  if size % parts:
    sizes = ' * '.join(f'{a} = {getattr(config, a)}' for a in over)
    raise InputError(
      f'{name}: its axis {axis!r} of {size} does not divide by mesh.{sizes};'
      f' change the size, or mesh.rules.{axis}'
    )
  for mesh_axis in over:
    if mesh_axis in seen and getattr(config, mesh_axis) > 1:
      raise InputError(
        f'{name}: both its axes {seen[mesh_axis]!r} and {axis!r} are sharded'
        f' over mesh.{mesh_axis}; change mesh.rules.{axis}'
      )
    seen[mesh_axis] = axis


def check_batch(
  config: MeshConfig, rows: int, seq_len: int, accumulate: int = 1
) -> None:
  """Raises InputError where a batch can't be sharded as the rules say.

  Args:
    config: sizes and rules.
    rows: sequences of a global batch.
    seq_len: tokens of a sequence.
    accumulate: micro-batches that a batch is split into.
  """
  ways = config.ways('batch')
  if rows % (ways * accumulate):
    raise InputError(
      f'train.batch: {rows} sequences cannot be split into {ways} shards of'
      f' mesh ({config.spread}) and {accumulate} micro-batches; set every size'
      f' to a multiple of {ways * accumulate}'
    )
  parts = config.ways('seq')
  if seq_len % parts:
    raise InputError(
      f'data.seq_len = {seq_len}: does not divide by mesh.context = {parts};'
      f' set data.seq_len to a multiple of {parts}, such as'
      f' {-(-seq_len // parts) * parts}, or another mesh.context'
    )


def shardings(
  mesh: Mesh, rules: Rules, abstract: dict[str, nnx.State], tree: Any
) -> Any:
  """Returns NamedShardings of a tree with a model's variables anywhere in it.

  Moments lie as their parameters do; what is no parameter is on every device.

  Args:
    mesh: of all axes that the rules name.
    rules: logical axis -> mesh axes.
    abstract: `Model.abstract`.
    tree: of arrays or shapes, e.g. a TrainState.
  """
  specs = {}
  for name, variable, stacked in named(abstract):
    axes = variable.get_metadata().get('axes') or ()
    parts = [names(rules.get(a)) or None for a in axes]
    specs[name] = PartitionSpec(*(None,) * stacked, *parts)

  def one(path: tuple, leaf: Any) -> NamedSharding:
    parts = jax.tree_util.keystr(path, simple=True, separator='.').split('.')
    for start in range(len(parts)):
      # The longest tail of the path that names a variable: any prefix may stand
      # before it, as in a TrainState's params or moments.
      spec = specs.get('.'.join(parts[start:]))
      if spec is not None and len(spec) == leaf.ndim:
        return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(one, tree)
