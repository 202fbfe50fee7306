"""Expert parallelism: tokens travel to the devices that hold their experts.

One interface, one meaning: `run` gives what all experts on one device would
give, on any mesh and by any of four ways. Nothing is dropped unless asked for:
what a buffer can't hold goes in a second round, or as many as it takes.
Legend: B sequences, T tokens, N tokens of a device, D model, E experts, K
chosen, F expert hidden, n devices that share the experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.config import above, at_least, name_dtypes
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import collectives as sums
from deepseek_jax.parallel import formats, wires
from deepseek_jax.parallel.rounds import Copies, Group, hop


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
  """Chooses how tokens reach experts on other devices; changes no meaning.

  Attributes:
    kind: 'all_gather': every device gets all tokens of its group; few devices
      or few tokens. 'all_to_all': a copy per chosen expert, in equal buffers.
      'ragged_all_to_all': the same without filler; GPU and TPU only.
      'two_hop': one copy per node to the device of the same place there, then
      on inside the node; results are added up in the node first
      (arXiv:2412.19437, section 3.2.2).
    dispatch: format of tokens on the wire; 'compute' leaves them as they are.
      'float8' has a float32 scale per 128 numbers.
    combine: format of results on the wire.
    factor: rows of a buffer, as a multiple of an even share.
    dropless: what does not fit a buffer goes in a further round; else it is
      dropped, and counted as dropped.
    nodes: into which the devices of the expert axis fall, for 'two_hop'.
  """

  kind: Literal['all_gather', 'all_to_all', 'ragged_all_to_all', 'two_hop'] = (
    'all_to_all'
  )
  dispatch: Literal['compute', 'bfloat16', 'float8'] = 'compute'
  combine: Literal['compute', 'bfloat16'] = 'compute'
  factor: float = 2.0
  dropless: bool = True
  nodes: int = 1

  def __post_init__(self):
    name_dtypes(self, 'dispatch', 'combine')
    above(self, factor=0)
    at_least(self, nodes=1)

  def check(self, devices: int, dim: int, platform: str = 'gpu') -> None:
    """Raises InputError where `devices` can't exchange rows of `dim` so."""
    if devices == 1:
      return
    if self.kind == 'ragged_all_to_all' and platform == 'cpu':
      raise InputError(
        "mesh.exchange.kind = 'ragged_all_to_all': XLA has none for a CPU; use"
        " 'all_to_all'"
      )
    if self.kind == 'two_hop' and devices % self.nodes:
      raise InputError(
        f'mesh.exchange.nodes = {self.nodes}: must divide mesh.expert ='
        f' {devices}'
      )
    formats.check(dim, self.dispatch)


def _flat(
  group: Group,
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sends a copy per chosen expert, straight to its device.

  Args:
    group: who exchanges.
    x: [N D].
    experts: [N K] int32; n * (experts of a device) or more means nowhere.
    weights: [N K] float32.
    gate_up, down: this device's experts, see `run`.

  Returns:
    As `hop`.
  """
  mine = gate_up.shape[0]
  K = experts.shape[1]
  to = jnp.minimum(experts // mine, group.size)

  def load_of(source: jax.Array) -> tuple[jax.Array, tuple]:
    inside = source < experts.size
    chosen = experts.reshape(-1)[jnp.minimum(source, experts.size - 1)]
    return jnp.where(inside, chosen % mine, -1), ()

  def work(
    rows: jax.Array, experts: jax.Array, _
  ) -> tuple[jax.Array, jax.Array]:
    nowhere = jnp.where(experts < 0, mine, experts)[:, None]
    ones = jnp.ones(nowhere.shape, jnp.float32)
    y = group.compute(rows, nowhere, ones, gate_up, down)
    return y, jnp.int32(0)

  copies = Copies(
    to,
    weights,
    jnp.ones(to.shape, jnp.int32),
    group.choices or to.size,
    x.shape[0] * min(K, mine),
  )
  return hop(group, x, copies, load_of, work)


def _two_hop(
  group: Group,
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sends a copy per node with chosen experts, then exchanges flat there.

  Arguments and results are those of `_flat` (arXiv:2412.19437, section 3.2.2).
  """
  nodes = group.cfg.nodes
  inner = group.size // nodes
  mine = gate_up.shape[0] * inner  # experts of a node
  inside = tuple(tuple(range(a * inner, (a + 1) * inner)) for a in range(nodes))
  across = tuple(tuple(range(l, group.size, inner)) for l in range(inner))
  # A token visits a node once, however many of its choices are there.
  node = experts[..., None] // mine == jnp.arange(nodes)  # [N K nodes]
  visits = node.sum(axis=1, dtype=jnp.int32)
  to = jnp.where(visits > 0, jnp.arange(nodes, dtype=jnp.int32), nodes)
  near = dataclasses.replace(
    group, size=inner, groups=inside, choices=experts.size
  )

  def load_of(source: jax.Array) -> tuple[jax.Array, jax.Array]:
    at = jnp.minimum(source, to.size - 1)
    token, there = at // nodes, at % nodes
    local = experts[token] - (there * mine)[:, None]
    keep = (local >= 0) & (local < mine) & (source < to.size)[:, None]
    return jnp.where(keep, local, -1), jnp.where(keep, weights[token], 0.0)

  def work(
    rows: jax.Array, local: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    nowhere = jnp.where(local < 0, mine, local)
    return _flat(near, rows, nowhere, weights, gate_up, down)

  far = dataclasses.replace(group, size=nodes, groups=across)
  copies = Copies(
    to,
    jnp.ones(to.shape, jnp.float32),
    visits,
    x.shape[0] * min(experts.shape[1], nodes),
    x.shape[0],
  )
  return hop(far, x, copies, load_of, work)


def _localized(group: Group, experts: jax.Array, mine: int) -> jax.Array:
  """Returns local expert numbers on this device; `mine` for those elsewhere."""
  local = experts - jax.lax.axis_index(group.axis) * mine
  return jnp.where((local >= 0) & (local < mine), local, mine)


def _all_gather(
  group: Group,
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Runs the local experts on the tokens of all devices."""
  wire = group.wire(x.dtype)
  whole = lambda a: jax.lax.all_gather(a, group.axis, tiled=True)
  local = _localized(group, whole(experts), gate_up.shape[0])
  rows = wires.gather(x, wire)
  y = group.compute(rows, local, whole(weights), gate_up, down)
  return wires.scatter(y, wire), jnp.int32(0)


def _shared_tokens(
  group: Group,
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Adds up what each device's experts give, where all have the same tokens."""
  local = _localized(group, experts, gate_up.shape[0])
  y = group.compute(x, local, weights, gate_up, down)
  # float32, as experts of one device are added up.
  total = jax.lax.psum(y.astype(jnp.float32), group.axis)
  return total.astype(y.dtype), jnp.int32(0)


def _way(group: Group, tokens_split: bool) -> Callable:
  """Returns the function that exchanges: `_flat` or one with its arguments."""
  if group.size == 1:
    return lambda group, *args: (group.compute(*args), jnp.int32(0))
  if not tokens_split:
    return _shared_tokens
  return {
    'all_gather': _all_gather,
    'all_to_all': _flat,
    'ragged_all_to_all': _flat,
    'two_hop': _two_hop,
  }[group.cfg.kind]


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of an entry of a PartitionSpec or of the rules."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _on_one_device(
  compute: Callable,
  arrays: tuple[jax.Array, ...],
  weights: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
  """Computes all experts here; nothing is exchanged and nothing dropped."""
  x = arrays[0]
  flat = (a.reshape(-1, a.shape[-1]) for a in arrays)
  return compute(*flat, *weights).reshape(x.shape), jnp.int32(0)


def run(
  compute: Callable,
  arrays: tuple[jax.Array, ...],
  weights: tuple[jax.Array, ...],
  using: Any,
) -> tuple:
  """Computes routed experts over a mesh.

  Args:
    compute: routed experts of one device: (x [N D], experts [N K], weights
      [N K], gate_up, down) -> [N D], where experts that are E mean nowhere.
    arrays: x [B T D], experts [B T K] int32 with E for nowhere, weights
      [B T K] float32.
    weights: gate_up [E D 2 F], down [E F D].
    using: sharding.Using.

  Returns:
    y [B T D]; int32, the choices that did not fit a first buffer: dropped,
    unless the exchange is dropless.

  Raises:
    InputError: a rule shards experts over several mesh axes, or the hidden
      units over an axis that shards tokens.
  """
  rules, mesh = using.rules, using.mesh
  if mesh.size == 1:
    return _on_one_device(compute, arrays, weights)
  there = lambda name: [n for n in _names(rules.get(name)) if n in mesh.shape]
  if len(there('experts')) > 1:
    raise InputError(
      f'mesh.rules.experts = {rules["experts"]}: must be one mesh axis'
    )
  # Experts may lie on one mesh axis, their hidden units on others.
  axis = (there('experts') or [None])[0]
  size = mesh.shape[axis] if axis else 1
  hidden = tuple(there('mlp'))
  tokens = using.spec(('batch', 'seq'), arrays[0].shape[:2])
  over = tuple(n for part in tokens for n in _names(part))
  if set(hidden) & set(over):
    raise InputError(
      f'mesh.rules.mlp = {rules["mlp"]!r}: shards tokens too, so its devices'
      ' have different ones; use an axis that batch and seq do not'
    )
  group = Group(using.exchange, compute, axis, size, mesh.axis_names)
  way = _way(group, axis in over)

  def local(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    flat = lambda a: a.reshape(-1, a.shape[-1])
    y, missed = way(group, flat(x), flat(experts), flat(weights), gate_up, down)
    # Each device of `hidden` has some hidden units: y is their sum.
    if any(mesh.shape[a] > 1 for a in hidden):
      y = sums.total(y, hidden)
    return y.reshape(x.shape), jax.lax.psum(missed, over) if over else missed

  experts_axis = axis if size > 1 else None
  rows = PartitionSpec(*tokens, None)
  specs = (
    PartitionSpec(experts_axis, None, None, hidden or None),
    PartitionSpec(experts_axis, hidden or None, None),
  )
  mapped = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(rows, rows, rows, *specs),
    out_specs=(rows, PartitionSpec()),
    check_vma=False,
  )
  return mapped(*arrays, *weights)
