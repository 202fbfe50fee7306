"""Pipeline parallelism: a schedule, as data, run over the mesh axis `stage`.

Every stage is a program of its own on its own slice of the mesh, dispatched in
the order of the simulated timeline (1F1B: arXiv:2104.04473; DualPipe:
DeepSeek-V3, arXiv:2412.19437, section 3.2). One program for all ranks (a scan
over ticks inside shard_map) would need equal stages, and V3's are not: dense
layers at the start, embedding, head and prediction at the ends. Separate
programs take any cut and any schedule, and the other mesh axes work inside a
stage as they do without a pipeline. The price: one process drives all devices.

Stage i is held by rank i. What else needs its weights gets a copy in every
step: with DualPipe the rank opposite, and the last stage the embedding.
Legend: P ranks, B sequences, T tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax import frozen, sharding
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import stage_calls
from deepseek_jax.parallel import stages as cutting
from deepseek_jax.parallel.exchange import ExchangeConfig
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
    exchange: how tokens reach experts of other devices of a stage.
    cross_document: as in `train_step`.
    trainable: as in `TrainConfig`.

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
    exchange: ExchangeConfig | None = None,
    cross_document: bool = True,
    trainable: tuple[str, ...] = (),
  ):
    ranks = slices(mesh)
    if len(schedule) != len(ranks):
      raise InputError(
        f'mesh.stage = {len(ranks)}: the schedule has {len(schedule)}'
        ' ranks; make them equal'
      )
    if jax.process_count() > 1:
      raise InputError(
        f'mesh.stage = {len(ranks)} in a run of {jax.process_count()}'
        ' processes: one must drive all devices of a pipeline; set mesh.stage'
        f' to 1 and another axis to {len(ranks)}, or start one process'
      )
    self.using = tuple(
      sharding.Using(rank, rules or {}, exchange or ExchangeConfig())
      for rank in ranks
    )
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
    self._parts = tuple(
      frozen.part(stage.functional.abstract['params'], trainable)
      if trainable
      else None
      for stage in self.stages
    )
    self._pulls: dict[Place, Any] = {}  # how to call each vjp's arrays
    self._programs: dict[tuple, Any] = {}
    self._cast = [jax.jit(stage.functional.cast) for stage in self.stages]

  def place(self, rank: int, direction: int) -> Place:
    """Where a rank works on chunks of a direction."""
    last = len(self.stages) - 1
    return Place(rank, last - rank if direction else rank)

  def put(self, x, rank: int, *axes):
    """Arrays of `axes` (the rest unsharded) onto a rank's devices."""
    using = self.using[rank]
    named = lambda a: (*axes, *(None,) * (a.ndim - len(axes)))
    one = lambda a: NamedSharding(using.mesh, using.spec(named(a), a.shape))
    return jax.device_put(x, jax.tree.map(one, x))

  def shardings(self, number: int, tree, rank: int | None = None):
    """Where a tree that holds a stage's variables lies.

    Args:
      number: of the stage.
      tree: arrays or shapes, e.g. parameters, moments and buffers.
      rank: whose devices; by default those of the rank that holds the stage.
    """
    using = self.using[number if rank is None else rank]
    abstract = self.stages[number].functional.abstract
    return meshes.shardings(using.mesh, using.rules, abstract, tree)

  def split(self, variables: dict) -> tuple[dict, ...]:
    """Every stage's own variables on the devices that hold it."""
    out = []
    for number, stage in enumerate(self.stages):
      mine = {kind: stage.take(tree) for kind, tree in variables.items()}
      out.append(jax.device_put(mine, self.shardings(number, mine)))
    return tuple(out)

  def join(self, trees) -> dict:
    """Trees by stage, e.g. gradients -> the whole model's, on the host."""
    return cutting.join(self.stages, trees)

  def copied(self, held, places=None) -> dict[Place, dict]:
    """Variables in the compute dtype wherever they are needed.

    Args:
      held: by stage, from `split`.
      places: which are; by default all of a step.
    """
    out = {}
    for number, stage in enumerate(self.stages):
      params, buffers = held[number]['params'], held[number]['buffers']
      if stage.embed and not stage.first:
        copy = {'embed': held[0]['params']['embed']}
        where = self.shardings(number, {'params': copy})['params']
        params = {**params, **jax.device_put(copy, where)}
      cast = self._cast[number]({'params': params, 'buffers': buffers})
      for place in places or self.places:
        if place.stage == number:
          where = self.shardings(number, cast, place.rank)
          out[place] = jax.device_put(cast, where)
    return out

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
      stage, part = self.stages[ahead.stage], self._parts[ahead.stage]

      def loss(params, stream):
        params = params if part is None else part.detached(params)
        own = {'params': params, 'buffers': variables['buffers']}
        return stage_calls.trained(
          stage, own, stream, batch, shares, self.cross_document
        )

      out, pull, metrics = jax.vjp(
        loss, variables['params'], stream, has_aux=True
      )
      kept, self._pulls[ahead] = jax.tree.flatten(pull)
      return out[0], kept, metrics

    def come_back(kept, cotangent, total):
      pull = jax.tree.unflatten(self._pulls[behind], kept)
      weights, stream = pull((cotangent, jnp.float32(1)))
      # What is not asked for, XLA does not compute.
      if kind != 'I':
        where = self.shardings(behind.stage, {'params': total}, behind.rank)
        total = add(total, weights)
        total = jax.lax.with_sharding_constraint(total, where['params'])
      return total, None if kind == 'W' else stream

    def both(there, back):
      return go(*there) if ahead else None, come_back(*back) if behind else None

    self._programs[key] = jax.jit(both)
    return self._programs[key]

  def gradients(self, held, batch: dict, mtp_weight: float = 0.0):
    """Gradients of the loss of a global batch, and its metrics.

    Args:
      held: variables by stage, from `split`.
      batch: 'tokens', 'segments', 'positions', each [B T+1] int32, B divisible
        by the schedule's micro-batches.
      mtp_weight: lambda.

    Returns:
      Gradients by stage, shaped and placed as `held`, and the metrics of
      `loss_and_metrics` for the whole batch, on the host.
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
    run = Step(self, self.copied(held), chosen, shares)
    for span in self._order:
      run.step(span.rank, span.step)
    return self._summed(run.totals), self._metrics(run.metrics)

  def _summed(self, totals: dict[Place, dict]) -> tuple[dict, ...]:
    """Gradients by stage, those of its copies added up."""
    last = len(self.stages) - 1
    out = []
    for number in range(last + 1):
      total = totals[Place(number, number)]
      other = totals.get(Place(last - number, number), total)
      if other is not total:
        total = self._plus(number, total, other)
      out.append(dict(total))
    if last and self.stages[last].embed:
      more = {'embed': out[last].pop('embed')}
      out[0] |= self._plus(0, {'embed': out[0]['embed']}, more)
    return tuple(out)

  def _plus(self, number: int, total: dict, more: dict) -> dict:
    """Adds parameters' gradients where the stage is held."""
    where = self.shardings(number, {'params': more})['params']
    return add(total, jax.device_put(more, where))

  def _metrics(self, found: dict[Place, list]) -> dict:
    """Metrics of all chunks as those of the whole batch."""
    by_stage = {}
    for place, chunks in found.items():
      by_stage.setdefault(place.stage, []).extend(jax.device_get(chunks))
    sums = [
      jax.tree.map(lambda *a: sum(a[1:], a[0]), *by_stage[i])
      for i in sorted(by_stage)
    ]
    loads = [cutting.nested(s.pop('loads'), '/') for s in sums]
    out = {'loads': cutting.flat(self.join(loads), '/')}
    for name in dict.fromkeys(name for stage in sums for name in stage):
      values = [stage[name] for stage in sums if name in stage]
      # Scalars are shares of a sum; what has axes has one of layers.
      per_layer = np.ndim(values[0]) > 0
      join = np.concatenate if per_layer else lambda v: sum(v[1:], v[0])
      out[name] = join(values)
    if 'recall' in out:
      out['recall'] = out['recall'] / out.pop('sparse_layers')
    return out
