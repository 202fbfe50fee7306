"""Runs the loop around the step: data in, numbers and checkpoints out."""

import contextlib
import dataclasses
import functools
import time

import jax
import numpy as np

from deepseek_jax import data as datalib
from deepseek_jax.errors import Preempted, RunAborted
from deepseek_jax.record import last_steps
from deepseek_jax.record.last_steps import LastSteps
from deepseek_jax.record.timeline import Timeline
from deepseek_jax.run import soundness, sources
from deepseek_jax.run.checkpoint import Checkpoints
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.folder import as_json
from deepseek_jax.run.preemption import Preemption
from deepseek_jax.run.profile import Profile
from deepseek_jax.run.staged_steps import StagedState, StagedSteps
from deepseek_jax.run.step_record import StepRecord
from deepseek_jax.run.steps import Steps
from deepseek_jax.run.watchdog import Watchdog
from deepseek_jax.train.step import TrainState


@dataclasses.dataclass
class Trainer:
  """Trains from the state that a run begins with to its end.

  With `until` it stops after so many steps, which are saved.
  """

  config: RunConfig
  store: sources.Store
  batches: datalib.Batches
  steps: Steps | StagedSteps
  checkpoints: Checkpoints
  record: StepRecord
  preemption: Preemption
  timeline: Timeline
  last_steps: LastSteps
  profile: Profile | None = None
  until: int | None = None

  def __post_init__(self) -> None:
    """Starts the watchdog, which writes the last steps before it ends a run."""
    safety = self.config.safety
    self._watchdog = Watchdog(
      safety.hang_factor,
      safety.hang_seconds,
      lambda seconds: self.last_steps.write(),
    )

  def run(self, state: TrainState | StagedState) -> TrainState | StagedState:
    """Trains to the end; returns the last state."""
    try:
      return self._run(state)
    except Preempted:
      raise
    except Exception:
      with contextlib.suppress(OSError):  # the cause is what to report
        self.last_steps.write()
      raise
    finally:
      self._watchdog.close()
      if self.profile:
        self.profile.close()
      with contextlib.suppress(OSError):
        self.timeline.write()
        self.record.writer.log(self.timeline.summary())

  def _run(self, state: TrainState | StagedState) -> TrainState | StagedState:
    """Trains to the end, without the files that a failure leaves."""
    config, length = self.config, self.config.data.seq_len
    number, tokens = int(state.step), int(state.sequences) * length
    while not self._over(number, tokens):
      start = time.perf_counter()
      # `_step` returns metrics on the host, so the time has the device's work.
      size = config.train.batch.at(tokens)
      if self.profile:
        self.profile.before(number + 1)
      state, metrics = self._step(number + 1, state, size)
      number, tokens = number + 1, tokens + size * length
      seconds = time.perf_counter() - start
      self.timeline.reached(number)
      told = self.profile and self.profile.after(number)
      if told:
        self.record.writer.log(told)
      buffers = functools.partial(self.steps.buffers, state)
      metrics |= _named_shares(self.batches.shares)
      self.record.step(number, metrics, buffers, size * length, seconds)
      self._give_up_if_stuck(number, metrics, state)
      last = self._over(number, tokens)
      every, at = config.evaluate.every, config.evaluate.at
      if _due(every, number) or (every and last) or number in at:
        with self.timeline.phase('evaluate'):
          self._validate(number, state)
      # Asked once a step in every process: they must answer alike.
      stop = self.preemption.asked(number) and not last
      if _due(config.checkpoint_every, number) or last or stop:
        with self.timeline.phase('checkpoint'):
          self._save(number, state, wait=last or stop)
        self.timeline.write()  # what follows is lost with another step
      if stop:
        raise Preempted(f'preempted: step {number} is saved')
    return state

  def _over(self, number: int, tokens: int) -> bool:
    """Returns whether the run ends, or stops, after so many steps."""
    stopped = self.until is not None and number >= self.until
    return tokens >= self.config.train.tokens or stopped or self._imitated()

  def _imitated(self) -> bool:
    """Returns whether the indexers' mean recall has reached its goal."""
    goal, recent = self.config.train.recall_goal, self.record.recalls[-10:]
    return bool(goal and len(recent) == 10 and np.mean(recent) >= goal)

  def _step(
    self, number: int, state: TrainState | StagedState, size: int
  ) -> tuple[TrainState | StagedState, dict]:
    """Takes the step that makes `number` complete.

    Returns:
      The next state, and the metrics on the host.
    """
    first, writer = self.batches.get_state()['next_index'], self.record.writer
    block = self.steps.block(size)
    with self.timeline.phase('data'):
      # Rollouts are drawn by the weights; other batches do not look.
      self.batches.see(lambda: self.steps.variables(state))
      rows = self.batches.next(size, *block)
      if self.batches.told:
        self.record.writer.write(number, self.batches.told)
      batch = self.steps.batch(rows, size)
    with self.timeline.phase('compile'):
      # By itself, so that the watchdog does not time compiling.
      self.steps.compiled(state, batch, writer)
    self.preemption.begin()
    with self.timeline.phase('step'), self._watchdog.step():
      state, metrics = self.steps(state, batch, writer)
      metrics = jax.device_get(metrics)
    identity = last_steps.identity(first, size, block, rows)
    kept = {k: v for k, v in metrics.items() if k != 'together'}  # large
    self.last_steps.add(number, identity, kept)
    return state, metrics

  def _give_up_if_stuck(
    self, number: int, metrics: dict, state: TrainState | StagedState
  ) -> None:
    """Raises RunAborted after `patience` refused updates in a row."""
    streak = int(metrics['streak'])
    if streak < self.config.train.gate.patience:
      return
    self.record.save()
    workdir = self.checkpoints.directory.parent
    why = soundness.of_refused(metrics, self.steps.whole(state), workdir)
    raise RunAborted(
      f'{streak} updates in a row were not finite or exploded, the last at'
      f' step {number} (loss {float(metrics["loss"]):.4g}, gradient norm'
      f' {float(metrics["grad_norm"]):.4g}, update norm'
      f' {float(metrics["update_norm"]):.4g}); checkpoints are from before;'
      f' {why}'
    )

  def _validate(self, number: int, state: TrainState | StagedState) -> None:
    """Writes the bits per byte of some held-out documents."""
    limit = self.config.evaluate.documents
    if self.config.rollouts is not None:
      variables = self.steps.variables(state)
      self.record.writer.write(number, self.batches.answered(variables, limit))
      return
    heldout = sources.heldout(self.store, self.config, limit)
    bits = self.steps.bits_per_byte(state, heldout)
    self.record.writer.write(number, {'validation_bits_per_byte': bits})

  def _save(
    self, number: int, state: TrainState | StagedState, *, wait: bool
  ) -> None:
    """Saves the state; `wait` returns when it is on disk."""
    self.record.save()
    self.checkpoints.save(
      number,
      self.steps.whole(state),
      self.batches.get_state(),
      as_json(self.config),
      held=self.batches.held(),
      wait=wait,
    )


def _named_shares(shares: dict[str, float]) -> dict[str, float]:
  """Returns the sources' shares as metrics, by the ends of their paths."""
  ends = [path.rstrip('/').rpartition('/')[2] for path in shares]
  return {
    f'share/{end if ends.count(end) == 1 else path}': share
    for (path, share), end in zip(shares.items(), ends)
  }


def _due(every: int, number: int) -> bool:
  """Returns whether something done every so many steps is due."""
  return every > 0 and number % every == 0
