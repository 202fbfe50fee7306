"""Repeats steps of a run from its checkpoint, to look at one of them."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax

from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.errors import InputError
from deepseek_jax.model.memory import ngram_hash
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel import processor
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.record import last_steps, metrics
from deepseek_jax.run import folder, sources
from deepseek_jax.run.checkpoint import Checkpoints
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.start import restored_to, with_classes
from deepseek_jax.train import warm_start
from deepseek_jax.train.step import TrainState, train_step


@dataclasses.dataclass(frozen=True)
class Replayed:
  """Describes one step, repeated.

  Attributes:
    step: completed steps, this one too.
    loss, grad_norm: as they come now.
    written: what the run wrote of them then; empty if that is lost.
    batch: what it read, see `last_steps.identity`; of several processes' rows
      those that were written down.
    block_norms: of the gradient, by block, see `block_norms`.
    written_batch: what the run wrote of the batch when it gave up, or {}.
  """

  step: int
  loss: float
  grad_norm: float
  written: dict[str, float]
  batch: dict
  block_norms: dict[str, list | float] = dataclasses.field(default_factory=dict)
  written_batch: dict = dataclasses.field(default_factory=dict)

  @property
  def same(self) -> bool:
    """Returns whether all that was written came back; True if nothing was."""
    numbers = all(
      value == getattr(self, name)
      or (math.isnan(value) and math.isnan(getattr(self, name)))
      for name, value in self.written.items()
    )
    return numbers and self.written_batch in ({}, self.batch)


def replay(workdir: Path, step: int) -> Iterator[Replayed]:
  """Repeats the steps from the newest whole checkpoint before `step` to it.

  Raises:
    InputError: the folder holds no run, or its data changed.
  """
  config = folder.config_of(workdir)
  if step > config.steps:
    raise InputError(f'step = {step}: the run has {config.steps} steps')
  model = build(config.model)
  # Here all is on one device, rollouts too.
  here = dataclasses.replace(config, mesh=MeshConfig())
  store = sources.opened(config, say.warn)
  batches = sources.batches(store, here)
  # From the nearest checkpoint on, the same program on the same batches.
  state = _before(workdir, step, config, model, batches)
  if config.model.engram_layers():
    state = with_classes(state, int(state.step), model, store)
    batches.ngrams = ngram_hash.host_hash(state.buffers)
  run = jax.jit(
    train_step(model, config.train, config.objective),
    donate_argnums=0,
    compiler_options=processor.options('train', config.model.compute.xla),
  )
  written, aborted = _written(workdir), _written_batches(workdir)
  for number in range(int(state.step) + 1, step + 1):
    tokens = int(state.sequences) * config.data.seq_len
    first = batches.get_state()['next_index']
    size = config.train.batch.at(tokens)
    # Rollouts are drawn by the weights; other batches do not look.
    variables = {'params': state.params, 'buffers': state.buffers}
    batches.see(lambda variables=variables: variables)
    batch = batches.next(size)
    state, out = run(state, batch)
    known = aborted.get(number, {})
    # With several processes one wrote its own rows down: compare these.
    start, end = known.get('rows', (0, size))
    block = start // (end - start), size // (end - start)
    rows = {'tokens': batch['tokens'][start:end]}
    place = last_steps.identity(first, size, block, rows)
    yield Replayed(
      number,
      float(out['loss']),
      float(out['grad_norm']),
      written.get(number, {}),
      place,
      jax.tree.map(lambda a: a.tolist(), jax.device_get(out['block_norms'])),
      known,
    )


def _before(
  workdir: Path,
  step: int,
  config: RunConfig,
  model: Model,
  batches: datalib.Batches,
) -> TrainState:
  """Returns the nearest state before a step; moves `batches` there."""
  fresh = functools.partial(folder.fresh_state, config, model)
  with Checkpoints(
    workdir / 'checkpoints', verify=config.safety.verify, read_only=True
  ) as checkpoints:
    found = checkpoints.newest_whole(before=step)
    if found is None:
      made = jax.jit(fresh, compiler_options=processor.options('init'))()
      return _warm(config, made)
    like = jax.eval_shape(fresh)
    restored = restored_to(checkpoints, found, like, config, batches)
  return restored.state


def _warm(config: RunConfig, fresh: TrainState) -> TrainState:
  """Returns a fresh state with the weights that the run began with."""
  source = config.init_from
  if not source:
    return fresh
  own = {'params': fresh.params, 'buffers': fresh.buffers}
  theirs = folder.load(source, same_code=False).variables
  return fresh._replace(**warm_start.variables(own, theirs, source)[0])


def _written_batches(workdir: Path) -> dict[int, dict]:
  """Returns {step: batch} of abort.jsonl; {} if the run wrote none."""
  if not (workdir / last_steps.FILE).exists():
    return {}
  return {row['step']: row['batch'] for row in last_steps.read(workdir)}


def _written(workdir: Path) -> dict[int, dict[str, float]]:
  """Returns {step: {'loss', 'grad_norm'}} of metrics.jsonl."""
  rows = metrics.read(workdir)
  names = ('loss', 'grad_norm')
  return {r['step']: {n: r[n] for n in names} for r in rows if 'loss' in r}
