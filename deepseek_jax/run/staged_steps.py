"""Runs the step of a run whose layers are cut into pipeline stages.

Every stage's parameters, buffers and moments lie on its own devices, and are
updated there; the whole is judged once. Checkpoints store the state as a run
without stages does, so a run may go on with any number of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax import data as datalib
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import processor, sharding
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.pipeline import chunk_orders as schedules
from deepseek_jax.pipeline import pipeline
from deepseek_jax.pipeline import stages as cutting
from deepseek_jax.pipeline.pipeline import Pipeline
from deepseek_jax.pipeline.reading import Reader
from deepseek_jax.record.metrics import MetricsWriter, NoMetrics
from deepseek_jax.run import folder
from deepseek_jax.run.compilation import compiling
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.steps import check_mesh
from deepseek_jax.train.config import (
  judging,
  optimizer_of,
  part_of,
  recipe_of,
)
from deepseek_jax.train.gate import GateState
from deepseek_jax.train.gradient_norms import block_norms, tree_norm
from deepseek_jax.train.step import TrainState
from deepseek_jax.train.update import (
  Held,
  Proposal,
  Verdict,
  judged,
  moving,
  proposed,
  tokens_seen,
  updated,
)


class StagedState(NamedTuple):
  """Holds a TrainState with its variables and moments by stage."""

  step: np.ndarray
  sequences: np.ndarray
  held: tuple[Held, ...]
  gate: GateState


class StagedSteps:
  """Runs steps through a pipeline, with the methods of `Steps`.

  Raises:
    InputError: mesh, schedule, model, batches and devices do not fit.
  """

  def __init__(self, model: Model, config: RunConfig):
    """Builds the stages and their programs; compiles when first called."""
    cfg, mesh = recipe_of(config.train, config.model), config.mesh
    config = dataclasses.replace(config, train=cfg)
    pipeline.check(config.model, mesh.stage)
    order = schedule(mesh, cfg.batch.accumulate)
    check_mesh(config)
    _check_rules(mesh)
    meshes.check(mesh, model.abstract)
    part_of(cfg, model.abstract['params'])  # names that no parameter has
    self._config = config
    self._fresh = functools.partial(folder.fresh_state, config, model)
    self._pipeline = Pipeline(
      config.model,
      meshes.make(mesh),
      order,
      rules=mesh.rules,
      exchange=mesh.exchange,
      objective=config.objective.build(model),
      trainable=cfg.trainable,
    )
    self._reader = Reader(self._pipeline)
    self._judge = jax.jit(self._judged)
    self._norms = jax.jit(block_norms)
    self._rules = [
      optimizer_of(
        cfg, stage.abstract['params'], self._pipeline.objective.frozen
      )
      for stage in self._pipeline.stages
    ]
    programs = map(self._programs, range(mesh.stage))
    self._propose, self._update = zip(*programs)
    self._compiled = set()

  def _part(self, number: int) -> Held:
    """Returns a stage's part of a new run's state."""
    key = jax.random.key(self._config.seed)
    made = self._pipeline.stages[number].init(key)
    moments = self._rules[number].init(made['params'])
    return Held(made['params'], made['buffers'], moments)

  def _programs(
    self, number: int
  ) -> tuple[Callable[..., Proposal], Callable[..., Held]]:
    """Returns a stage's two programs: its proposal, and its update.

    The gradients are donated to the first, the state to the second.
    """
    shapes = jax.eval_shape(functools.partial(self._part, number))
    where = self._pipeline.shardings(number, shapes)
    propose = jax.jit(
      functools.partial(proposed, self._rules[number]),
      donate_argnums=1,
      out_shardings=Proposal(where.params, where.moments, None, None),
    )
    return propose, jax.jit(updated, donate_argnums=0, out_shardings=where)

  def _judged(
    self, state: StagedState, loss: jax.Array, norm: jax.Array, norms: tuple
  ) -> tuple[Verdict, GateState, dict]:
    """Returns `judged` from the norms of the stages' updates."""
    length = self._config.data.seq_len
    whole = tree_norm(norms)
    cfg = judging(self._config.train, self._pipeline.objective.comparable)
    return judged(cfg, state, loss, norm, whole, length)

  def _gradients(self, state: StagedState, batch: dict) -> tuple[list, dict]:
    """Returns the stages' gradients and the metrics of a batch."""
    cfg = self._config
    tokens = tokens_seen(state, cfg.data.seq_len)
    weight = float(cfg.train.mtp_weight.at(tokens, cfg.train.tokens))
    return self._pipeline.gradients(_variables(state), batch, weight)

  def __call__(
    self, state: StagedState, batch: dict, writer: MetricsWriter | NoMetrics
  ) -> tuple[StagedState, dict]:
    """Returns the next state, and metrics as of `train_step`, on the host."""
    self.compiled(state, batch, writer)
    # Forward and backward through all stages.
    grads, metrics = self._gradients(state, batch)
    norms = jax.device_get(tuple(map(self._norms, grads)))
    # The norm of the whole gradient, of which each stage has a part.
    norm = jax.device_get(tree_norm(norms))
    proposals = self._proposed(state.held, grads, norm)
    each, updates = jax.device_get(
      tuple(zip(*((p.norm, p.norms) for p in proposals)))
    )
    verdict, gate, told = jax.device_get(
      # Judged once, by the whole model's norms.
      self._judge(state._replace(held=()), metrics['loss'], norm, each)
    )
    held = self._updated(state.held, proposals, metrics.pop('loads'), verdict)
    metrics |= told | {
      'block_norms': self._whole_norms(norms),
      'update_norms': self._whole_norms(updates),
    }
    rows = np.uint32(len(batch['tokens']))
    return StagedState(state.step + 1, state.sequences + rows, held, gate), (
      metrics
    )

  def _proposed(
    self, held: tuple[Held, ...], grads: list, norm: np.ndarray
  ) -> list[Proposal]:
    """Returns each stage's proposal, computed on its own devices."""
    out = []
    for number, propose in enumerate(self._propose):
      with sharding.under(self._pipeline.using[number]):
        out.append(propose(held[number], grads[number], norm))
    return out

  def _updated(
    self,
    held: tuple[Held, ...],
    proposals: list[Proposal],
    loads: dict,
    verdict: Verdict,
  ) -> tuple[Held, ...]:
    """Returns each stage's next variables and moments, on its own devices."""
    loads = loads if self._pipeline.objective.moves_biases else {}
    loads, out = cutting.nested(loads, '/'), []
    trainable = self._config.train.trainable
    for number, stage in enumerate(self._pipeline.stages):
      own = moving(cutting.flat(stage.take(loads), '/'), trainable)
      with sharding.under(self._pipeline.using[number]):
        out.append(
          self._update[number](held[number], proposals[number], own, verdict)
        )
    return tuple(out)

  def _whole_norms(self, norms: tuple[dict, ...]) -> dict:
    """Returns norms of the stages' blocks by the names of the whole model."""
    trees = [cutting.nested(own, '.') for own in norms]
    return cutting.flat(self._pipeline.join(trees), '.')

  def compiled(
    self, state: StagedState, batch: dict, writer: MetricsWriter | NoMetrics
  ) -> None:
    """Compiles for batches of this size, by a pass that changes nothing.

    A program's inputs are known when those before it have run.
    """
    rows = len(batch['tokens'])
    if rows not in self._compiled:
      with compiling(rows, writer):
        jax.block_until_ready(self._gradients(state, batch)[0])
      self._compiled.add(rows)

  def begin(self) -> StagedState:
    """Returns the state of a new run, each part made where it lies."""
    held = []
    for number in range(len(self._pipeline.stages)):
      make = functools.partial(self._part, number)
      where = self._pipeline.shardings(number, jax.eval_shape(make))
      with sharding.under(self._pipeline.using[number]):
        how = processor.options('init')
        made = jax.jit(make, out_shardings=where, compiler_options=how)
        held.append(made())
    others = lambda: self._fresh()._replace(params=0, buffers=0, moments=0)
    new = jax.device_get(jax.jit(others)())
    return StagedState(new.step, new.sequences, tuple(held), new.gate)

  def like(self) -> TrainState:
    """Returns what a checkpoint stores, as NumPy arrays of no memory."""
    one = lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape)
    return jax.tree.map(one, jax.eval_shape(self._fresh))

  def adopt(self, state: TrainState) -> StagedState:
    """Returns a restored state as steps take it."""
    whole, held = Held(state.params, state.buffers, state.moments), []
    for number, stage in enumerate(self._pipeline.stages):
      # Each stage takes its layers to its own devices.
      part = cutting.take_each(stage, whole)
      where = self._pipeline.shardings(number, part)
      held.append(jax.device_put(part, where))
    return StagedState(state.step, state.sequences, tuple(held), state.gate)

  def whole(self, state: StagedState) -> TrainState:
    """Returns a state as a checkpoint stores it, on the host."""
    held = cutting.join_each(self._pipeline.stages, state.held)
    return TrainState(state.step, state.sequences, *held, state.gate)

  def variables(self, state: StagedState) -> dict:
    """Returns what the whole model is applied with."""
    whole = self.whole(state)
    return {'params': whole.params, 'buffers': whole.buffers}

  def buffers(self, state: StagedState) -> dict:
    """Returns the model's buffers, on the host."""
    return self._pipeline.join([held.buffers for held in state.held])

  def with_variables(self, state: StagedState, variables: dict) -> StagedState:
    """Returns the state with other parameters and buffers."""
    parts = self._pipeline.split(variables)
    held = [old._replace(**new) for old, new in zip(state.held, parts)]
    return state._replace(held=tuple(held))

  def block(self, size: int) -> tuple[int, int]:
    """Returns (block, blocks) of the rows that this process reads: all."""
    del size
    return 0, 1

  def batch(self, rows: dict[str, np.ndarray], size: int) -> dict:
    """Returns a global batch, which stays on the host: micro-batches travel."""
    del size
    return rows

  def bits_per_byte(
    self, state: StagedState, heldout: datalib.Heldout
  ) -> float:
    """Returns the bits per byte of held-out documents."""
    return self._reader.bits_per_byte(_variables(state), heldout)


def schedule(mesh: MeshConfig, micro_batches: int) -> schedules.Schedule:
  """Returns the chunk order that a mesh asks for.

  Raises:
    InputError: there are too few micro-batches for it, or an odd number.
  """
  P, M = mesh.stage, micro_batches
  if mesh.schedule == '1f1b':
    if M < P:
      raise InputError(
        f'train.batch.accumulate = {M}: fewer micro-batches than mesh.stage ='
        f' {P}, so stages would idle throughout; set it to {P} or more'
      )
    return schedules.one_f_one_b(P, M)
  if P % 2:
    raise InputError(
      f'mesh.stage = {P}: mesh.schedule = dualpipe needs an even number; set'
      f' it to {P + 1}, or mesh.schedule to 1f1b'
    )
  if M % 2 or M < 2 * P:
    raise InputError(
      f'train.batch.accumulate = {M}: dualpipe over mesh.stage = {P} needs an'
      f' even number of micro-batches, {2 * P} or more'
    )
  return schedules.dualpipe(P, M)


def _check_rules(mesh: MeshConfig) -> None:
  """Raises InputError for a sharding rule over the axis of stages."""
  for name, over in mesh.rules.items():
    if 'stage' in meshes.names(over):
      raise InputError(
        f'mesh.rules.{name} = {over!r}: with mesh.stage = {mesh.stage} the'
        ' axis stage shards layers; name another axis'
      )


def _variables(state: StagedState) -> list[dict]:
  """Returns the parameters and buffers by stage."""
  return [{'params': h.params, 'buffers': h.buffers} for h in state.held]
