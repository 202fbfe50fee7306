"""Pipeline parallelism: a schedule, as data, run over the mesh axis `stage`.

Every stage is a program of its own on its own slice of the mesh, dispatched in
the order of the simulated timeline (1F1B: arXiv:2104.04473; DualPipe:
DeepSeek-V3, arXiv:2412.19437, section 3.2). One program for all ranks (a scan
over ticks inside shard_map) would need equal stages, and V3's are not: dense
layers at the start, embedding, head and prediction at the ends. Separate
programs take any split and any schedule, and the other mesh axes work inside a
stage as they do without a pipeline. The price: one process drives all devices.

Stage i is stored on rank i. What else needs its weights gets a copy in every
step: with DualPipe the rank opposite, and the last stage the embedding.
Legend: P ranks, B sequences, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import processor, sharding
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.pipeline import stage_calls
from deepseek_jax.pipeline import stages as cutting
from deepseek_jax.pipeline import sums as pipeline_sums
from deepseek_jax.pipeline.chunk_orders import Schedule
from deepseek_jax.pipeline.one_pass import OnePass, Place, add
from deepseek_jax.pipeline.simulate import Durations, simulate
from deepseek_jax.train import trainable as frozen
from deepseek_jax.train.objective import (
  Objective,
  PretrainingConfig,
  Shares,
  shares_of,
)


def slices(mesh: Mesh) -> tuple[Mesh, ...]:
  """Returns the mesh of each rank: `mesh` at each index of its axis `stage`."""
  if 'stage' not in mesh.axis_names:
    raise InputError(f"mesh axes {mesh.axis_names}: a pipeline needs 'stage'")
  # [stage ...]: the devices of each rank.
  axis = mesh.axis_names.index('stage')
  names = tuple(n for n in mesh.axis_names if n != 'stage')
  ranks = np.moveaxis(mesh.devices, axis, 0)
  if not names:
    names, ranks = ('data',), ranks[:, None]
  return tuple(Mesh(devices, names) for devices in ranks)


def check(config: TransformerConfig, stages: int) -> None:
  """Raises InputError where a model or a run can't have so many stages."""
  if jax.process_count() > 1:
    raise InputError(
      f'mesh.stage = {stages} in a run of {jax.process_count()} processes: one'
      ' must drive all devices of a pipeline; set mesh.stage to 1 and another'
      f' axis to {stages}, or start one process'
    )
  cutting.cut(config, stages)


class Pipeline:
  """Computes the gradients of one global batch, by a schedule.

  Args:
    config: a model.
    mesh: has an axis `stage`, as long as the schedule has ranks; the other
      axes are those of every stage.
    schedule: of chunk_orders; sets how many micro-batches there are.
    rules: logical axis -> mesh axis inside a stage.
    exchange: how tokens reach experts of other devices of a stage.
    objective: what is optimised; None is next-token prediction.
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
    objective: Objective | None = None,
    trainable: tuple[str, ...] = (),
  ):
    ranks = slices(mesh)
    if len(schedule) != len(ranks):
      raise InputError(
        f'mesh.stage = {len(ranks)}: the schedule has {len(schedule)}'
        ' ranks; make them equal'
      )
    check(config, len(ranks))
    self.using = tuple(
      sharding.Using(rank, rules or {}, exchange or ExchangeConfig())
      for rank in ranks
    )
    self.objective = objective or PretrainingConfig().build(None)
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
    self._zeros: dict[Place, Any] = {}
    self._cast = [jax.jit(stage.functional.cast) for stage in self.stages]

  def place(self, rank: int, direction: int) -> Place:
    """Returns where a rank works on chunks of a direction."""
    last = len(self.stages) - 1
    return Place(rank, last - rank if direction else rank)

  def put(self, x: Any, rank: int, *axes: str | None) -> Any:
    """Puts arrays of `axes` (the rest unsharded) onto a rank's devices."""
    using = self.using[rank]
    named = lambda a: (*axes, *(None,) * (a.ndim - len(axes)))
    one = lambda a: NamedSharding(using.mesh, using.spec(named(a), a.shape))
    return jax.device_put(x, jax.tree.map(one, x))

  def shardings(self, number: int, tree: Any, rank: int | None = None) -> Any:
    """Returns NamedShardings of a tree that has a stage's variables in it.

    Args:
      number: of the stage.
      tree: arrays or shapes, e.g. parameters, moments and buffers.
      rank: whose devices; by default those of the rank that holds the stage.
    """
    using = self.using[number if rank is None else rank]
    abstract = self.stages[number].functional.abstract
    return meshes.shardings(using.mesh, using.rules, abstract, tree)

  def split(self, variables: dict) -> tuple[dict, ...]:
    """Returns every stage's local variables, on the devices that store it."""
    out = []
    for number, stage in enumerate(self.stages):
      mine = {kind: stage.take(tree) for kind, tree in variables.items()}
      out.append(jax.device_put(mine, self.shardings(number, mine)))
    return tuple(out)

  def join(self, trees: Sequence[dict]) -> dict:
    """Joins trees by stage, e.g. gradients, to the model's, on the host."""
    return cutting.join(self.stages, trees)

  def copied(
    self, held: Sequence[dict], places: Sequence[Place] | None = None
  ) -> dict[Place, dict]:
    """Returns variables in the compute dtype wherever they are needed.

    Args:
      held: by stage, from `split`.
      places: which are; by default all of a step.
    """
    out = {}
    for number, stage in enumerate(self.stages):
      params, buffers = held[number]['params'], held[number]['buffers']
      if stage.embed and not stage.first:
        # A tied head or multi-token prediction reads the first one's embedding.
        copy = {'embed': held[0]['params']['embed']}
        where = self.shardings(number, {'params': copy})['params']
        params = {**params, **jax.device_put(copy, where)}
      cast = self._cast[number]({'params': params, 'buffers': buffers})
      for place in places or self.places:
        if place.stage == number:
          where = self.shardings(number, cast, place.rank)
          out[place] = jax.device_put(cast, where)
    return out

  def program(
    self, ahead: Place | None, behind: Place | None, kind: str
  ) -> Callable:
    """Returns the jitted program of a step on one rank.

    Args:
      ahead: whose forward chunk is part of it.
      behind: whose backward chunk is part of it.
      kind: of that one, 'B', 'I' or 'W'; '' without one.

    Returns:
      (inputs of the forward chunk, of the backward chunk, sums of gradients) ->
      (results of `go`, of `come_back`), None for a chunk that is not there. The
      sums are donated.
    """
    key = ahead, behind, kind
    if key in self._programs:
      return self._programs[key]

    def go(variables: dict, stream: Any, batch: dict, shares: Shares) -> tuple:
      stage, part = self.stages[ahead.stage], self._parts[ahead.stage]

      def loss(params: dict, stream: Any) -> tuple:
        params = params if part is None else part.detached(params)
        own = {'params': params, 'buffers': variables['buffers']}
        return stage_calls.trained(
          stage, own, stream, batch, shares, self.objective
        )

      # The vjp crosses programs as its arrays; how to call them stays here.
      out, pull, metrics = jax.vjp(
        loss, variables['params'], stream, has_aux=True
      )
      kept, self._pulls[ahead] = jax.tree.flatten(pull)
      return out[0], kept, metrics

    def come_back(kept: list, cotangent: Any, total: Any) -> tuple:
      pull = jax.tree.unflatten(self._pulls[behind], kept)
      weights, stream = pull((cotangent, jnp.float32(1)))
      # What is not asked for, XLA does not compute.
      if kind == 'I':
        return None, stream
      where = self.totals_where(behind, total)
      total = jax.lax.with_sharding_constraint(add(total, weights), where)
      return total, None if kind == 'W' else stream

    def both(there: tuple, back: tuple, total: Any) -> tuple:
      went = go(*there) if ahead else None
      return went, come_back(*back, total) if behind else None

    xla = self.stages[0].config.compute.xla
    self._programs[key] = jax.jit(
      both,
      donate_argnums=2,
      compiler_options=processor.options('train', xla),
    )
    return self._programs[key]

  def totals_where(self, place: Place, tree: Any) -> Any:
    """Returns NamedShardings of a tree of a place's gradients."""
    return self.shardings(place.stage, {'params': tree}, place.rank)['params']

  def zeros(self, place: Place) -> Any:
    """Returns float32 zeros, to which a place's gradients are added."""
    if place not in self._zeros:
      init = self.stages[place.stage].functional.init
      shapes = jax.eval_shape(init, jax.random.key(0))['params']
      zero = lambda s: jnp.zeros(s.shape, jnp.float32)
      self._zeros[place] = jax.jit(
        lambda: jax.tree.map(zero, shapes),
        out_shardings=self.totals_where(place, shapes),
      )
    return self._zeros[place]()

  def gradients(
    self, held: Sequence[dict], batch: dict, mtp_weight: float = 0.0
  ) -> tuple[tuple[dict, ...], dict]:
    """Computes the gradients of the loss of a global batch, and its metrics.

    Args:
      held: variables by stage, from `split`.
      batch: what the objective reads, arrays [B ...], B divisible by the
        schedule's micro-batches.
      mtp_weight: lambda.

    Returns:
      Gradients by stage, float32, shaped and placed as `held`, and the metrics
      of `loss_and_metrics` for the whole batch, on the host.

    Raises:
      InputError: B does not divide by the micro-batches.
    """
    rows, count = len(batch['tokens']), len(self._forwards)
    if rows % count:
      raise InputError(
        f'batch of {rows} sequences: must divide by the {count} micro-batches'
        ' of the schedule'
      )
    # Every micro-batch's loss is a share of the global batch's mean.
    inputs = self.objective.inputs(batch)
    shares = shares_of(inputs, count, np.float32(mtp_weight))
    host = lambda a: a if isinstance(a, int) else np.float32(a)
    shares = Shares(*map(host, shares))
    micro = jax.tree.map(
      lambda a: np.asarray(a).reshape(count, -1, *a.shape[1:]), batch
    )
    numbers = {key: i for i, key in enumerate(self._forwards)}
    chosen = lambda *key: jax.tree.map(lambda a: a[numbers[key]], micro)
    # One process dispatches all programs, in an order in which none waits.
    run = OnePass(self, self.copied(held), chosen, shares)
    for span in self._order:
      run.step(span.rank, span.step)
    return pipeline_sums.summed(self, run.totals), pipeline_sums.metrics(
      self, run.metrics
    )
