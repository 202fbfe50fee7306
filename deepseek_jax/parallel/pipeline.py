"""Pipeline parallelism: a schedule, as data, run over the mesh axis `stage`.

Every stage is a program of its own on its own slice of the mesh, dispatched in
the order of the simulated timeline (1F1B: arXiv:2104.04473; DualPipe:
DeepSeek-V3, arXiv:2412.19437, section 3.2). One program for all ranks (a scan
over ticks inside shard_map) would need equal stages, and V3's are not: dense
layers at the start, embedding, head and prediction at the ends. Separate
programs take any cut and any schedule, and the other mesh axes work inside a
stage as they do without a pipeline. The price: one process drives all devices.
Legend: P ranks, B sequences, T tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax import sharding
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import stages as cutting
from deepseek_jax.parallel.pipeline_step import Place, Step, add
from deepseek_jax.plan.pipeline import Durations, simulate
from deepseek_jax.plan.schedules import Schedule
from deepseek_jax.train import Shares, targets
from deepseek_jax.transformer import TransformerConfig


def slices(mesh: Mesh) -> tuple[Mesh, ...]:
  """The mesh of each rank: `mesh` at every index of its axis `stage`."""
  if 'stage' not in mesh.axis_names:
    raise InputError(f"mesh axes {mesh.axis_names}: a pipeline needs 'stage'")
  axis = mesh.axis_names.index('stage')
  names = tuple(n for n in mesh.axis_names if n != 'stage')
  ranks = np.moveaxis(mesh.devices, axis, 0)
  if not names:
    names, ranks = ('data',), ranks[:, None]
  return tuple(Mesh(devices, names) for devices in ranks)


class Pipeline:
  """The gradients of one global batch, by a schedule.

  Args:
    config: a model.
    mesh: has an axis `stage`, as long as the schedule has ranks; the other
      axes are those of every stage.
    schedule: of plan.schedules; says how many micro-batches there are.
    rules: logical axis -> mesh axis inside a stage.
    cross_document: as in `train_step`.

  Raises:
    InputError: mesh, schedule and model do not fit each other.
  """

  def __init__(
    self,
    config: TransformerConfig,
    mesh: Mesh,
    schedule: Schedule,
    *,
    rules: sharding.Rules | None = None,
    cross_document: bool = True,
  ):
    if jax.process_count() > 1:
      raise InputError(
        f'{jax.process_count()} processes: a pipeline needs one that drives'
        ' all devices; use the other mesh axes between processes'
      )
    self.meshes = slices(mesh)
    if len(schedule) != len(self.meshes):
      raise InputError(
        f'mesh.stage = {len(self.meshes)}: the schedule has {len(schedule)}'
        ' ranks; make them equal'
      )
    self.rules = {} if rules is None else rules
    self.cross_document = cross_document
    # Any durations give an order that no chunk has to wait in.
    self._order = simulate(schedule, Durations()).spans
    chunks = {c for s in self._order if s.rank == 0 for c in s.step}
    self._forwards = sorted(c[1:] for c in chunks if c.kind == 'F')
    self.stages = cutting.cut(config, len(schedule))
    both = any(c.direction for c in chunks)
    last = len(schedule) - 1
    self.places = tuple(
      Place(rank, stage)
      for rank in range(last + 1)
      for stage in sorted({rank, last - rank} if both else {rank})
    )
    self._pulls: dict[Place, Any] = {}  # how to call each vjp's arrays
    self._programs: dict[tuple, Any] = {}
    self.cast = {
      place: jax.jit(self.stages[place.stage].functional.cast)
      for place in self.places
    }

  def place(self, rank: int, direction: int) -> Place:
    """Where a rank works on chunks of a direction."""
    last = len(self.stages) - 1
    return Place(rank, last - rank if direction else rank)

  def put(self, x, rank: int, *axes):
    """Arrays of `axes` (the rest unsharded) onto a rank's devices."""
    mesh = self.meshes[rank]
    one = lambda a: NamedSharding(
      mesh, sharding.spec((*axes, *(None,) * (a.ndim - len(axes))), self.rules)
    )
    return jax.device_put(x, jax.tree.map(one, x))

  def split(self, variables: dict) -> dict[Place, dict]:
    """Every stage's variables where they are used."""
    out = {}
    for place in self.places:
      stage, mesh = self.stages[place.stage], self.meshes[place.rank]
      mine = {kind: stage.take(tree) for kind, tree in variables.items()}
      for kind, abstract in stage.functional.abstract.items():
        where = sharding.shardings(abstract, mesh, self.rules)
        leaves, tree = jax.tree.flatten(mine[kind])
        moved = jax.device_put(leaves, jax.tree.leaves(where))
        mine[kind] = jax.tree.unflatten(tree, moved)
      out[place] = mine
    return out

  def join(self, held: dict[Place, Any], *, add: bool = True) -> dict:
    """Trees by place -> the whole model's, on the host.

    `add`s up what several stages hold, as gradients want it and variables
    don't.
    """
    first = {p.stage: held[p] for p in reversed(self.places)}
    return cutting.join(self.stages, [first[i] for i in sorted(first)], add)

  def program(self, ahead: Place | None, behind: Place | None, kind: str):
    """The jitted program of a step on one rank.

    Args:
      ahead: whose forward chunk is part of it.
      behind: whose backward chunk is part of it.
      kind: of that one, 'B', 'I' or 'W'.
    """
    key = ahead, behind, kind
    if key in self._programs:
      return self._programs[key]

    def go(variables, stream, batch, shares):
      stage = self.stages[ahead.stage]
      rest = variables['buffers'], batch, shares, self.cross_document
      out, pull, metrics = jax.vjp(
        lambda params, stream: stage(params, stream, *rest),
        variables['params'],
        stream,
        has_aux=True,
      )
      kept, self._pulls[ahead] = jax.tree.flatten(pull)
      return out[0], kept, metrics

    def come_back(kept, cotangent, total):
      pull = jax.tree.unflatten(self._pulls[behind], kept)
      weights, stream = pull((cotangent, jnp.float32(1)))
      # What is not asked for, XLA does not compute.
      total = total if kind == 'I' else add(total, weights)
      return total, None if kind == 'W' else stream

    def both(there, back):
      return go(*there) if ahead else None, come_back(*back) if behind else None

    self._programs[key] = jax.jit(both)
    return self._programs[key]

  def gradients(
    self, held: dict[Place, dict], batch: dict, mtp_weight: float = 0.0
  ):
    """Gradients of the loss of a global batch, and its metrics.

    Args:
      held: from `split`.
      batch: 'tokens', 'segments', 'positions', each [B T+1] int32, B divisible
        by the schedule's micro-batches.
      mtp_weight: lambda.

    Returns:
      Gradients by place (a stage's are equal wherever it is held), and the
      metrics of `loss_and_metrics` for the whole batch.
    """
    rows, count = len(batch['tokens']), len(self._forwards)
    if rows % count:
      raise InputError(
        f'batch of {rows} sequences: must divide by the {count} micro-batches'
        ' of the schedule'
      )
    weights = targets(batch, self.cross_document)[-1]
    denominator = float(np.maximum(np.asarray(weights).sum(), 1.0))
    shares = Shares(np.float32(denominator), count, np.float32(mtp_weight))
    micro = jax.tree.map(
      lambda a: np.asarray(a).reshape(count, -1, *a.shape[1:]), batch
    )
    numbers = {key: i for i, key in enumerate(self._forwards)}
    chosen = lambda *key: jax.tree.map(lambda a: a[numbers[key]], micro)
    run = Step(self, held, chosen, shares)
    for span in self._order:
      run.step(span.rank, span.step)
    return self._summed(run.totals), self._metrics(run.metrics)

  def _summed(self, totals: dict[Place, dict]) -> dict[Place, dict]:
    """Adds the gradients of the two ranks that hold a stage."""
    out = dict(totals)
    for place in self.places:
      other = Place(len(self.stages) - 1 - place.rank, place.stage)
      if other in totals and other.rank > place.rank:
        like = jax.tree.map(lambda a: a.sharding, totals[place])
        total = add(totals[place], jax.device_put(totals[other], like))
        back = jax.tree.map(lambda a: a.sharding, totals[other])
        out[place], out[other] = total, jax.device_put(total, back)
    return out

  def _metrics(self, found: dict[Place, list]) -> dict:
    """Metrics of all chunks as those of the whole batch."""
    by_stage = {}
    for place, chunks in found.items():
      by_stage.setdefault(place.stage, []).extend(jax.device_get(chunks))
    sums = [
      jax.tree.map(lambda *a: sum(a[1:], a[0]), *by_stage[i])
      for i in sorted(by_stage)
    ]
    loads = [_nested(s.pop('loads')) for s in sums]
    out = {'loads': _flat(cutting.join(self.stages, loads, True))}
    for name in dict.fromkeys(name for stage in sums for name in stage):
      values = [stage[name] for stage in sums if name in stage]
      # Scalars are shares of a sum; what has axes has one of layers.
      per_layer = np.ndim(values[0]) > 0
      join = np.concatenate if per_layer else lambda v: sum(v[1:], v[0])
      out[name] = join(values)
    if 'recall' in out:
      out['recall'] = out['recall'] / out.pop('sparse_layers')
    return out


def _nested(loads: dict) -> dict:
  """{'segments/0/1': x} -> {'segments': {0: {1: x}}}."""
  out = {}
  for path, value in loads.items():
    kind, number, last = path.split('/')
    last = int(last) if last.isdigit() else last
    out.setdefault(kind, {}).setdefault(int(number), {})[last] = value
  return out


def _flat(tree: dict) -> dict:
  return {
    f'{kind}/{number}/{last}': value
    for kind, numbers in tree.items()
    for number, inner in numbers.items()
    for last, value in inner.items()
  }
