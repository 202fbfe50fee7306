"""A training run: data, steps, metrics, checkpoints, resumption.

The run's folder holds config.json, metrics.jsonl, timings.jsonl,
timeline.jsonl, routing.npz and checkpoints/, and abort.jsonl if it gave up.
Started again with the same configuration, a run goes on from its last whole
checkpoint and sees the batches that it would have seen. Of several processes
the first writes; all save and read the checkpoints, in a folder that all share.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax import config as configs
from deepseek_jax import data as datalib
from deepseek_jax import evaluate, integrity, last_steps, warm_start
from deepseek_jax import metrics as metric_files
from deepseek_jax.checkpoint import Checkpoints, flatten
from deepseek_jax.data.ngrams import token_classes
from deepseek_jax.errors import InputError, Preempted, RunAborted
from deepseek_jax.flight import FlightRecorder, max_violation
from deepseek_jax.last_steps import LastSteps
from deepseek_jax.layers import ngram_hash
from deepseek_jax.metrics import MetricsWriter, NoMetrics
from deepseek_jax.parallel import distributed, placement
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.placement import Placement
from deepseek_jax.preemption import Preemption
from deepseek_jax.timeline import Timeline
from deepseek_jax.train import (
  TrainConfig,
  TrainState,
  initial_state,
  train_step,
)
from deepseek_jax.transformer import Model, TransformerConfig, build
from deepseek_jax.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Validation while training, on some held-out documents.

  Attributes:
    every: steps between validations (0: none).
    documents: how many at most while training; the end reads all.
    batch: rows at a time.
    stride: tokens between the starts of overlapping windows; None is half.
  """

  every: int = 0
  documents: int = 8
  batch: int = 8
  stride: int | None = None


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
  """What a run does about faults. Changes no number, and may change at will.

  Attributes:
    verify: of a checkpoint before it is read: 'full' hashes all of it, 'sample'
      compares sizes and hashes some, 'off' trusts it.
    hang_factor: a step that takes this many medians of the steps before ends
      the process with status 79; 0 lets it hang.
    hang_seconds: that a step may take in any case.
    last_steps: how many are written to abort.jsonl when the run gives up.
  """

  verify: str = 'full'
  hang_factor: float = 30.0
  hang_seconds: float = 120.0
  last_steps: int = 20

  def __post_init__(self):
    integrity.check_choice(self.verify)
    for name in ('hang_factor', 'hang_seconds', 'last_steps'):
      if getattr(self, name) < 0:
        raise InputError(
          f'safety.{name} = {getattr(self, name)}: must not be negative'
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One run, whole.

  Attributes:
    model, data, train, evaluate, safety, mesh: see there.
    seed: of the initialisation; the data have their own.
    checkpoint_every: steps between checkpoints (0: only at the end).
    keep: checkpoints that stay.
    tensorboard: also write event files.
    init_from: folder of a run to take the weights from; '': none.
  """

  model: TransformerConfig
  data: datalib.DataConfig
  train: TrainConfig
  evaluate: EvaluateConfig = EvaluateConfig()
  safety: SafetyConfig = SafetyConfig()
  mesh: MeshConfig = MeshConfig()
  seed: int = 0
  checkpoint_every: int = 0
  keep: int = 2
  tensorboard: bool = False
  init_from: str = ''

  def __post_init__(self):
    configs.check_choices(self)
    if self.data.vocab_size > self.model.vocab_size:
      raise InputError(
        f'data.vocab_size = {self.data.vocab_size}: more than'
        f' model.vocab_size = {self.model.vocab_size}; raise the latter'
      )
    blocks = [b for s in self.model.segments() for b in s.blocks]
    measured = [getattr(b.attention, 'measures_recall', False) for b in blocks]
    if self.train.recall_goal and not any(measured):
      raise InputError(
        f'train.recall_goal = {self.train.recall_goal}: no attention of this'
        ' model measures recall, so the run would never reach it; set it to 0'
        " or take sparse attention with recall_queries or stage = 'dense'"
      )

  @property
  def steps(self) -> int:
    """Steps of the run, with the batch ramp."""
    per_sequence, tokens, steps = self.data.seq_len, 0, 0
    batch = self.train.batch
    while tokens < min(batch.ramp_tokens, self.train.tokens):
      tokens += batch.at(tokens) * per_sequence
      steps += 1
    left = max(self.train.tokens - tokens, 0)
    return steps + int(-(-left // (batch.size * per_sequence)))


@dataclasses.dataclass(frozen=True)
class Run:
  """What a finished run leaves in memory."""

  config: RunConfig
  model: Model
  store: datalib.Store
  state: TrainState
  tokens_per_second: float | None  # median of this launch; None without steps

  @property
  def variables(self) -> dict:
    return {'params': self.state.params, 'buffers': self.state.buffers}


def _json(config: RunConfig) -> dict:
  return json.loads(json.dumps(configs.to_dict(config)))


def claim(workdir: Path, config: RunConfig) -> None:
  """Writes config.json, or checks that it is this run's.

  Raises:
    InputError: the folder is another run's; names the first fields that differ.
      Or several processes do not share it.
  """
  path = workdir / 'config.json'
  mine = _json(config)
  if not distributed.first() and not path.exists():
    raise InputError(
      f'workdir {workdir}: process {jax.process_index()} does not see what'
      ' process 0 wrote there; choose a folder that all processes share'
    )
  if path.exists():
    try:
      theirs = json.loads(path.read_text())
    except ValueError:
      raise InputError(
        f'{path} is not JSON: mend it, or choose another --workdir'
      ) from None
    lines = _differences(_filled(theirs), mine)
    if lines:
      raise InputError(
        f'workdir {workdir} holds another run ({"; ".join(lines[:3])}):'
        ' choose another --workdir or the same configuration'
      )
    return
  if workdir.exists() and any(workdir.iterdir()):
    raise InputError(
      f'workdir {workdir} is not empty and holds no run: choose another'
      ' --workdir'
    )
  workdir.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix('.tmp')
  scratch.write_text(json.dumps(mine, indent=2) + '\n')
  os.replace(scratch, path)


def _filled(written: dict) -> dict:
  """A config.json with the defaults of fields that came after it."""
  try:
    return _json(configs.from_dict(RunConfig, written))
  except InputError:
    return written


def _differences(theirs: dict, mine: dict) -> list[str]:
  theirs, mine = flatten(theirs), flatten(mine)
  names = dict.fromkeys([*theirs, *mine])
  absent = 'absent'
  return [
    f'{n}: {theirs.get(n, absent)!r} there, {mine.get(n, absent)!r} here'
    for n in names
    if theirs.get(n, absent) != mine.get(n, absent)
    and not n.startswith(('safety.', 'mesh.'))
  ]


_SCALARS = (
  'loss',
  'mtp_loss',
  'balance_loss',
  'attention_loss',
  'recall',
  'grad_norm',
  'learning_rate',
  'skipped',
)


class _Steps:
  """Compiled train steps, one per batch size, and what compiling cost."""

  def __init__(self, model: Model, config: RunConfig, where: Placement):
    step = train_step(
      model, config.train, cross_document=config.data.cross_document
    )
    state = jax.eval_shape(functools.partial(fresh_state, config, model))
    places = where.shardings(state, model.abstract), where.copied
    self._step = jax.jit(step, donate_argnums=0, out_shardings=places)
    self._where = where
    self._compiled = {}

  def __call__(self, state, batch, writer):
    return self.compiled(state, batch, writer)(state, batch)

  def compiled(self, state, batch, writer):
    """The step for batches of this size."""
    rows = batch['tokens'].shape[0]
    if rows not in self._compiled:
      start, hits = time.perf_counter(), _cache_hits[0]
      with self._where.use():
        self._compiled[rows] = self._step.lower(state, batch).compile()
      source = 'from the cache' if _cache_hits[0] > hits else 'anew'
      writer.log(
        f'compiled the step for {rows} sequences in'
        f' {time.perf_counter() - start:.1f} s, {source}'
      )
    return self._compiled[rows]


_cache_hits = [0]


def _count_hits(event: str, **_) -> None:
  _cache_hits[0] += event == '/jax/compilation_cache/cache_hits'


jax.monitoring.register_event_listener(_count_hits)


def _recorder(workdir, model, resume) -> FlightRecorder | None:
  layers, number = [], 0
  for segment in model.config.segments():
    for _ in range(segment.repeat):
      for block in segment.blocks:
        if hasattr(block.ffn, 'experts'):
          layers.append(number)
        number += 1
  if not layers:
    return None
  path = workdir / 'routing.npz'
  record = lambda: FlightRecorder(
    path,
    {
      'load': 'sum',
      'dropped': 'sum',
      'bias': 'last',
      'entropy': 'mean',
      'moved': 'mean',
    },
    coarse={'together': 'sum'},
    layers=layers,
    resume_step=resume,
  )
  try:
    return record()
  except InputError as error:
    # Of an earlier version, which recorded less: both files stay.
    path.rename(path.with_name(f'routing-until-{resume}.npz'))
    _warn(f'{error}; it is now routing-until-{resume}.npz')
    return record()


def router_biases(model: Model, buffers: dict) -> np.ndarray | None:
  """[L E] in layer order, 0 where a layer has none; None if no layer has."""
  out, found = [], False
  for i, segment in enumerate(model.config.segments()):
    stacks = []
    for j, block in enumerate(segment.blocks):
      if not hasattr(block.ffn, 'experts'):
        continue
      place = buffers.get('segments', {}).get(i, {}).get(j, {})
      bias = place.get('ffn', {}).get('router', {}).get('bias')
      found = found or bias is not None
      if bias is None:
        bias = np.zeros((segment.repeat, block.ffn.experts), np.float32)
      stacks.append(np.asarray(bias))
    if stacks:
      stacked = np.stack(stacks, axis=1)
      out.append(stacked.reshape(-1, stacked.shape[-1]))
  return np.concatenate(out) if found else None


def fit(config: RunConfig, workdir: str | Path, *, console: bool = True) -> Run:
  """Trains from the last whole checkpoint, or from the start, to the end.

  Args:
    config: the run.
    workdir: its folder; must be new, or this run's.
    console: shows progress.

  Raises:
    InputError: the configuration, the data or the folder are wrong.
    RunAborted: too many updates in a row were not fit to be applied.
    Preempted: SIGTERM came; the step that was under way is saved.
  """
  workdir = Path(workdir)
  with Preemption() as preemption:
    first = distributed.first()
    timeline = Timeline(workdir / 'timeline.jsonl' if first else None)
    with timeline.phase('init'):
      model = build(config.model)
      where = _placed(config, model)
      with distributed.first_goes_first():
        store = datalib.build(config.data)
        batches = datalib.Batches(store, config.data)
        claim(workdir, config)
      if first:
        store.tokenizer().save(str(workdir))
        if config.init_from:
          warm_start.check_tokenizer(workdir, Path(config.init_from))
    with Checkpoints(
      workdir / 'checkpoints',
      keep=config.keep,
      verify=config.safety.verify,
      say=_warn,
    ) as checkpoints:
      with timeline.phase('restore' if checkpoints.steps() else 'init'):
        state, resumed = _start(config, model, where, checkpoints, batches)
        if model.config.engram_layers():
          state = _with_classes(state, resumed, model, store)
          batches.ngrams = ngram_hash.host_hash(state.buffers)
      timeline.begin(resumed)
      with _writer(config, workdir, resumed, console) as writer:
        if resumed:
          writer.log(f'resumed from step {resumed}')
        trainer = _Trainer(
          config,
          model,
          store,
          where,
          batches,
          checkpoints,
          writer,
          _recorder(workdir, model, resumed or -1) if first else None,
          preemption,
          timeline,
          LastSteps(
            workdir / 'abort.jsonl', config.safety.last_steps if first else 0
          ),
          _recalls(workdir, resumed),
        )
        state = trainer.run(state)
  return Run(config, model, store, state, trainer.tokens_per_second)


def _placed(config: RunConfig, model: Model) -> Placement:
  """Where the run lives; whatever does not fit is found here."""
  if config.mesh.stage > 1:
    raise InputError(
      f'mesh.stage = {config.mesh.stage}: a training run has no pipeline; set'
      ' it to 1 and another axis to that'
    )
  batch = config.train.batch
  for rows in {batch.at(0), batch.size}:
    length = config.data.seq_len
    meshes.check_batch(config.mesh, rows, length, batch.accumulate)
  exchange, ways = config.mesh.exchange, config.mesh.ways('experts')
  exchange.check(ways, config.model.dim, jax.default_backend())
  return placement.choose(config.mesh, model.abstract)


def _recalls(workdir: Path, resumed: int) -> list[float]:
  """Those of the steps before, for a run that ends by them."""
  rows = metric_files.read(workdir) if resumed else []
  return [r['recall'] for r in rows if 'recall' in r and r['step'] <= resumed]


def _writer(config, workdir, resumed: int, console: bool):
  if not distributed.first():
    return NoMetrics()
  return MetricsWriter(
    workdir,
    total_steps=config.steps,
    tensorboard=config.tensorboard,
    console=console,
    resume_step=resumed or -1,
  )


class Loaded(NamedTuple):
  """A run read back from its folder."""

  config: RunConfig
  model: Model
  variables: dict
  tokenizer: Any  # datalib.Tokenizer or ByteTokenizer
  step: int


def load(workdir: str | Path) -> Loaded:
  """The newest checkpoint of a run; needs none of its data.

  Raises:
    InputError: the folder holds no run, or none with a checkpoint.
  """
  workdir = Path(workdir)
  path = workdir / 'config.json'
  if not path.exists():
    raise InputError(f'workdir {workdir}: holds no run (no config.json)')
  config = configs.from_dict(RunConfig, json.loads(path.read_text()))
  model = build(config.model)
  with Checkpoints(
    workdir / 'checkpoints', verify=config.safety.verify
  ) as checkpoints:
    step = checkpoints.newest_whole(_warn)
    if step is None:
      raise InputError(f'workdir {workdir}: the run has saved no checkpoint')
    fresh = functools.partial(fresh_state, config, model)
    state = checkpoints.restore(step, jax.eval_shape(fresh)).state
  variables = {'params': state.params, 'buffers': state.buffers}
  tokenizer = datalib.from_file(str(workdir / 'tokenizer.json'))
  return Loaded(config, model, variables, tokenizer, step)


def fresh_state(config: RunConfig, model: Model) -> TrainState:
  """The state before the first step of a run."""
  variables = model.init(jax.random.key(config.seed))
  return initial_state(model, config.train, variables)


def _start(config, model, where, checkpoints, batches):
  """The state to begin with, and the step it was saved at (0: new)."""
  fresh = functools.partial(fresh_state, config, model)
  step = checkpoints.newest_whole(_warn)
  if step is None:
    state = where.make(fresh, model.abstract)
    if config.init_from:
      state = _warm(config.init_from, state, model, where)
    return state, 0
  checkpoints.set_aside_after(step)
  like = where.abstract(fresh, model.abstract)
  restored = checkpoints.restore(step, like)
  batches.set_state(restored.data)
  return restored.state, step


def _warm(source: str, state: TrainState, model, where) -> TrainState:
  """The state with the weights of another run."""
  fresh = {'params': state.params, 'buffers': state.buffers}
  begun, new = warm_start.variables(fresh, load(source).variables, source)
  if distributed.first():
    _warn(f'weights are of {source}; fresh: {", ".join(new) or "none"}')
  places = where.shardings(begun, model.abstract)
  begun = jax.jit(lambda v: v, out_shardings=places)(begun)
  return state._replace(**begun)


def _with_classes(state, resumed, model, store):
  """A new run's memory gets the classes of the tokenizer's tokens."""
  if resumed:
    return state
  classes = token_classes(store.tokenizer(), model.config.vocab_size)
  buffers = ngram_hash.with_classes(model.config.engram, state.buffers, classes)
  return state._replace(buffers=buffers)


def _warn(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass
class _Trainer:
  """The loop around the step."""

  config: RunConfig
  model: Model
  store: datalib.Store
  where: Placement
  batches: datalib.Batches
  checkpoints: Checkpoints
  writer: MetricsWriter | NoMetrics
  recorder: FlightRecorder | None
  preemption: Preemption
  timeline: Timeline
  last_steps: LastSteps
  recalls: list  # of the steps so far

  def __post_init__(self):
    self._steps = _Steps(self.model, self.config, self.where)
    self._speeds: list[float] = []
    safety = self.config.safety
    self._watchdog = Watchdog(
      safety.hang_factor,
      safety.hang_seconds,
      lambda seconds: self.last_steps.write(),
    )

  @property
  def tokens_per_second(self) -> float | None:
    """Median over the steps but the first, which waits for the compiler."""
    speeds = self._speeds[1:] or self._speeds
    return float(np.median(speeds)) if speeds else None

  def run(self, state: TrainState) -> TrainState:
    try:
      return self._run(state)
    except Preempted:
      raise
    except Exception:
      with contextlib.suppress(OSError):  # the cause is what to tell
        self.last_steps.write()
      raise
    finally:
      self._watchdog.close()
      with contextlib.suppress(OSError):
        self.timeline.write()
        self.writer.log(self.timeline.summary())

  def _run(self, state):
    config, length = self.config, self.config.data.seq_len
    number, tokens = int(state.step), int(state.sequences) * length
    while tokens < config.train.tokens and not self._imitated():
      start = time.perf_counter()
      size = config.train.batch.at(tokens)
      state, metrics = self._step(number + 1, state, size)
      number, tokens = number + 1, tokens + size * length
      seconds = time.perf_counter() - start
      self.timeline.reached(number)
      self._report(number, metrics, state, size * length, seconds)
      self._give_up_if_stuck(number, metrics)
      last = tokens >= config.train.tokens or self._imitated()
      if _due(config.evaluate.every, number) and not last:
        with self.timeline.phase('evaluate'):
          self._validate(number, state)
      stop = self.preemption.asked(number) and not last
      if _due(config.checkpoint_every, number) or last or stop:
        with self.timeline.phase('checkpoint'):
          self._save(number, state, wait=last or stop)
        self.timeline.write()  # what follows is lost with another step
      if stop:
        raise Preempted(f'preempted: step {number} is saved')
    return state

  def _imitated(self) -> bool:
    """Whether the indexers have found what they were to find."""
    goal, recent = self.config.train.recall_goal, self.recalls[-10:]
    return bool(goal and len(recent) == 10 and np.mean(recent) >= goal)

  def _step(self, number, state, size):
    """The step that makes `number` complete -> state, metrics on the host."""
    first = self.batches.get_state()['next_index']
    block = self.where.block(size)
    with self.timeline.phase('data'):
      rows = self.batches.next(size, *block)
      batch = self.where.batch(rows, size)
    with self.timeline.phase('compile'):
      self._steps.compiled(state, batch, self.writer)
    with self.timeline.phase('step'), self._watchdog.step():
      state, metrics = self._steps(state, batch, self.writer)
      metrics = jax.device_get(metrics)
    identity = last_steps.identity(first, size, block, rows)
    kept = {k: v for k, v in metrics.items() if k != 'together'}  # large
    self.last_steps.add(number, identity, kept)
    return state, metrics

  def _report(self, number, metrics, state, tokens, seconds):
    scalars = {k: float(metrics[k]) for k in _SCALARS if k in metrics}
    if 'recall' in scalars:
      self.recalls.append(scalars['recall'])
    speed = tokens / seconds
    self._speeds.append(speed)
    if self.recorder:
      load = np.asarray(metrics['load'])
      scalars['max_violation'] = float(max_violation(load).mean())
      biases = router_biases(self.model, state.buffers)
      if biases is None:
        biases = np.zeros(load.shape, np.float32)
      together = np.asarray(metrics['together'])
      # N tokens that choose K experts are N K choices and N K^2 pairs.
      tokens = load.sum(axis=-1) ** 2 / np.maximum(together.sum((-2, -1)), 1)
      tokens = np.maximum(tokens, 1)
      self.recorder.record(
        number,
        load=load,
        dropped=metrics['dropped'],
        bias=biases,
        entropy=metrics['entropy'] / tokens,
        moved=metrics['moved'] / tokens,
        together=together,
      )
    timings = {'tokens_per_second': speed, 'seconds': seconds}
    self.writer.write(number, scalars, timings)

  def _give_up_if_stuck(self, number, metrics):
    streak = int(metrics['streak'])
    if streak < self.config.train.gate.patience:
      return
    if self.recorder:
      self.recorder.save()
    raise RunAborted(
      f'{streak} updates in a row were not finite or exploded, the last at'
      f' step {number} (loss {float(metrics["loss"]):.4g}, gradient norm'
      f' {float(metrics["grad_norm"]):.4g}); checkpoints are from before'
    )

  def _validate(self, number, state):
    cfg = self.config.evaluate
    heldout = datalib.Heldout(
      self.store,
      self.config.data.seq_len,
      cfg.batch,
      stride=cfg.stride,
      limit=cfg.documents,
    )
    variables = {'params': state.params, 'buffers': state.buffers}
    with self.where.use():
      bits = evaluate.bits_per_byte(self.model, variables, heldout)
    self.writer.write(number, {'validation_bits_per_byte': bits})

  def _save(self, number, state, *, wait: bool):
    if self.recorder:
      self.recorder.save()
    self.checkpoints.save(
      number, state, self.batches.get_state(), _json(self.config), wait=wait
    )


def _due(every: int, number: int) -> bool:
  return every > 0 and number % every == 0
