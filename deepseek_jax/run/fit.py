"""Trains a model: data, steps, metrics, checkpoints, resumption.

The run's folder holds config.json, metrics.jsonl, timings.jsonl,
timeline.jsonl, routing.npz and checkpoints/, and abort.jsonl if it gave up.
Started again with the same configuration, a run goes on from its last whole
checkpoint and reads the batches that it would have read. Settings that change
no trained number may differ then (see run/folder.py). With several processes
the first writes; all save and read the checkpoints, in a folder that all share.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from deepseek_jax import say
from deepseek_jax.data.batches import Batches
from deepseek_jax.errors import InputError, told
from deepseek_jax.model.memory import ngram_hash
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record.last_steps import LastSteps
from deepseek_jax.record.timeline import Timeline
from deepseek_jax.record.writers import ScalarWriter
from deepseek_jax.run import (
  agreement,
  ignored_fields,
  reference_policy,
  sources,
)
from deepseek_jax.run.checkpoint import Checkpoints
from deepseek_jax.run.chosen import chosen
from deepseek_jax.run.config import EvaluateConfig, RunConfig, SafetyConfig
from deepseek_jax.run.folder import (
  Loaded,
  claim,
  config_of_source,
  fresh_state,
  keep_tokenizer,
  load,
  path_of,
  renew,
)
from deepseek_jax.run.preemption import Preemption
from deepseek_jax.run.profile import Profile
from deepseek_jax.run.staged_steps import StagedSteps
from deepseek_jax.run.start import check_source, start, with_classes
from deepseek_jax.run.step_record import StepRecord, router_biases
from deepseek_jax.run.steps import Steps
from deepseek_jax.run.trainer import Trainer
from deepseek_jax.train.step import TrainState

__all__ = [
  'EvaluateConfig',
  'Loaded',
  'Run',
  'RunConfig',
  'SafetyConfig',
  'claim',
  'fit',
  'fresh_state',
  'load',
  'router_biases',
]


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds what a finished run leaves in memory."""

  config: RunConfig
  model: Model
  store: sources.Store
  state: TrainState
  tokens_per_second: float | None  # median of this launch; None without steps

  @property
  def variables(self) -> dict:
    """Returns {'params': ..., 'buffers': ...}, as `Model.apply` takes them."""
    return {'params': self.state.params, 'buffers': self.state.buffers}


def _check(config: object, writers: object) -> None:
  """Raises InputError for what is no RunConfig, or takes no scalars."""
  if not isinstance(config, RunConfig):
    fix = 'ds.recipes.v3_tiny() makes one, of a model, data and training'
    if callable(config) and hasattr(config, '__name__'):
      fix = f'call it: {config.__name__}()'
    raise InputError(f'config: is {told(config)}, no RunConfig; {fix}')
  for one in writers if isinstance(writers, list | tuple) else [writers]:
    if not hasattr(one, 'write') or not hasattr(one, 'close'):
      raise InputError(
        f'writers: holds {told(one)}; give a list of ScalarWriters, or set'
        ' config.tensorboard'
      )


def _check_sources(config: RunConfig) -> None:
  """Raises InputError for weights that are nowhere, before text is read."""
  named = {'init_from': config.init_from}
  if config.rollouts:
    named['rollouts.reference'] = config.rollouts.reference
  for field, source in named.items():
    if source:
      config_of_source(field, source)


def _opened(
  config: RunConfig, model: Model, workdir: Path, console: bool
) -> tuple[sources.Store, Batches, list[str]]:
  """Opens the data of a run and claims its folder.

  Returns:
    The tokens, their stream, and how config.json differs from the run, see
    `claim`.
  """
  first = distributed.first()
  # A begun run has its weights, whatever became of their source.
  anew = first and not (workdir / 'config.json').exists()
  told = say.warn if first else lambda line: None
  for line in ignored_fields.lines(config):
    told(line)
  with distributed.first_goes_first():
    if anew:
      _check_sources(config)
    if first and console:
      print(f'reading {", ".join(config.data.paths)}', flush=True)
    store = sources.opened(config, told)
  # All together: a teacher's checkpoint is read by all processes at once.
  batches = sources.batches(store, config)
  with distributed.first_goes_first():
    if anew and config.init_from:
      check_source(config, model, store.tokenizer())
    if anew and config.rollouts and config.rollouts.reference:
      reference_policy.check(config, model, store.tokenizer())
    changes = claim(workdir, config)
  return store, batches, changes


def _steps(
  model: Model, config: RunConfig, workdir: Path
) -> Steps | StagedSteps:
  """Returns the steps of a run; those of a new one begin to be compiled."""
  if config.mesh.stage > 1:
    return StagedSteps(model, config)
  steps = Steps(model, config)
  begun = (workdir / 'config.json').exists()
  like = None if begun else sources.batch_like(config)
  if like is not None:
    steps.compile_ahead(like)
  return steps


def _went_on(resumed: int, changes: Iterable[str]) -> list[str]:
  """Returns lines on where a run goes on, and what it changed."""
  lines = [f'resumed from step {resumed}'] if resumed else []
  return lines + [f'config.json changed: {change}' for change in changes]


def fit(
  config: RunConfig,
  workdir: str | Path,
  *,
  console: bool = True,
  announce: Callable[[RunConfig, sources.Store], Iterable[str]] | None = None,
  writers: Sequence[ScalarWriter] = (),
  profile: tuple[int, int] | None = None,
  until: int | None = None,
) -> Run:
  """Trains from the last whole checkpoint, or from the start, to the end.

  Args:
    config: the run.
    workdir: its folder; must be new, or this run's.
    console: shows progress.
    announce: gives the first lines of a run whose text is read.
    writers: take the scalars of every step, too; closed at the end.
    profile: first and last step of a trace in workdir/profile.
    until: the step after which to stop and save; called again, the run goes on.

  Raises:
    InputError: the configuration, the data or the folder are wrong.
    RunAborted: too many updates in a row were not fit to be applied.
    Preempted: SIGTERM came; the step that was under way is saved.
    Terminated: it came before the first step; nothing new is saved.
  """
  workdir = path_of(workdir)
  _check(config, writers)
  config = chosen(config, workdir)
  with Preemption() as preemption:
    first = distributed.first()
    agreement.check_config(config)
    timeline = Timeline(workdir / 'timeline.jsonl' if first else None, say.warn)
    with timeline.phase('init'):
      model = build(config.model)
      # Whatever does not fit is found here.
      steps = _steps(model, config, workdir)
      store, batches, changes = _opened(config, model, workdir, console)
      agreement.check_data(config, store)
    with Checkpoints(
      workdir / 'checkpoints',
      keep=config.keep,
      verify=config.safety.verify,
      say=say.warn,
    ) as checkpoints:
      with timeline.phase('restore' if checkpoints.steps() else 'init'):
        # Moves `batches` to the place where the state was saved.
        state, resumed, bound = start(config, steps, checkpoints, batches)
        if first:  # now that the data are known to be the run's
          keep_tokenizer(workdir, store.tokenizer(), bound)
          renew(workdir, config)
        if model.config.engram_layers():
          state = with_classes(state, resumed, model, store)
          batches.ngrams = ngram_hash.host_hash(state.buffers)
      timeline.begin(resumed)
      record = StepRecord(
        config, model, workdir, resumed, console=console, writers=writers
      )
      with record:
        lines = announce(config, store) if announce and first else ()
        for line in (*lines, *_went_on(resumed, changes)):
          record.writer.log(line)
        kept = config.safety.last_steps if first else 0
        trace = (profile, workdir / 'profile') if profile and first else None
        trainer = Trainer(
          config,
          store,
          batches,
          steps,
          checkpoints,
          record,
          preemption,
          timeline,
          LastSteps(workdir / 'abort.jsonl', kept),
          trace and Profile(*trace),
          until,
        )
        state = steps.whole(trainer.run(state))
  return Run(config, model, store, state, record.tokens_per_second)
