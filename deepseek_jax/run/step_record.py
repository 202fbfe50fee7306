"""Writes what steps leave in a run's folder: scalars, and routing.

No number that is trained depends on these files: a damaged one is renamed, with
one line, and the run goes on.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deepseek_jax import say
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record import metrics as metric_files
from deepseek_jax.record.flight import DamagedFile
from deepseek_jax.record.load_balance import max_violation
from deepseek_jax.record.metric import Metric, describe
from deepseek_jax.record.metrics import (
  MetricsWriter,
  NoMetrics,
  set_aside,
  unused,
)
from deepseek_jax.record.routing import FlightRecorder
from deepseek_jax.record.writers import ScalarWriter, WandB
from deepseek_jax.rl import rollout
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.folder import as_json
from deepseek_jax.train import layer_losses
from deepseek_jax.train.step import metrics_of

# What a run adds to the metrics of its steps.
METRICS = {
  'bits_per_byte': Metric('Bits per byte'),
  'max_violation': Metric('MaxVio', 'of the fullest expert, mean of layers'),
  'tokens_per_second': Metric('Tokens per second'),
  'seconds': Metric('Seconds', 'of a step'),
}


class StepRecord:
  """Writes the numbers of steps; with several processes the first one alone.

  Attributes:
    writer: of metrics and lines.
    recalls: of the steps so far, those before a resumption too.
  """

  def __init__(
    self,
    config: RunConfig,
    model: Model,
    workdir: Path,
    resumed: int,
    *,
    console: bool,
    writers: Sequence[ScalarWriter] = (),
  ):
    """Opens the files of a run's folder, in process 0.

    Args:
      config: the run.
      model: its model.
      workdir: its folder.
      resumed: step that the run goes on from; 0 begins anew.
      console: shows progress.
      writers: further takers of the numbers.
    """
    first = distributed.first()
    self._model, self._speeds = model, []
    self.writer = _writer(config, workdir, resumed, console, writers)
    self._known = metrics_of(config.objective.build(model))
    if first:
      rounds = rollout.METRICS if config.rollouts is not None else {}
      describe(workdir, self._known | rounds | METRICS)
    self._routing = _recorder(workdir, model, resumed or -1) if first else None
    recalls = _recalls(workdir, resumed) if first else []
    # All processes end by them at one step.
    self.recalls = json.loads(distributed.text_from_first(json.dumps(recalls)))

  def __enter__(self) -> 'StepRecord':
    """Returns itself; the block's end closes the writer."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes the writer, after an error too."""
    self.writer.__exit__(*error)

  @property
  def tokens_per_second(self) -> float | None:
    """Returns the median over steps but the first, which compiles, or None."""
    speeds = self._speeds[1:]
    return float(np.median(speeds)) if speeds else None

  def step(
    self,
    number: int,
    metrics: dict,
    buffers: Callable[[], dict],
    tokens: int,
    seconds: float,
  ) -> None:
    """Writes a step.

    Args:
      number: completed steps, this one too.
      metrics: what it returned, on the host.
      buffers: gives the model's buffers after it.
      tokens: that it read.
      seconds: that it took.
    """
    # Numbers alone; arrays per layer go to routing.npz.
    found = scalars_of(metrics)
    # As described, the loss first: jit returns them by the alphabet.
    order = dict.fromkeys([*self._known, *found])
    scalars = {name: found[name] for name in order if name in found}
    if 'recall' in scalars:
      self.recalls.append(scalars['recall'])
    if self._routing:
      violation = max_violation(np.asarray(metrics['load']))
      scalars['max_violation'] = float(violation.mean())
      self._record_routing(number, metrics, buffers())
    speed = tokens / seconds
    self._speeds.append(speed)
    timings = {'tokens_per_second': speed, 'seconds': seconds}
    self.writer.write(number, scalars, timings)

  def _record_routing(self, number: int, metrics: dict, buffers: dict) -> None:
    """Adds a step's routing to routing.npz."""
    load, together = (np.asarray(metrics[k]) for k in ('load', 'together'))
    biases = router_biases(self._model, buffers)
    if biases is None:
      biases = np.zeros(load.shape, np.float32)
    # N tokens that choose K experts are N K choices and N K^2 pairs.
    tokens = load.sum(axis=-1) ** 2 / np.maximum(together.sum((-2, -1)), 1)
    tokens = np.maximum(tokens, 1)
    self._routing.record(
      number,
      load=load,
      dropped=metrics['dropped'],
      bias=biases,
      entropy=metrics['entropy'] / tokens,
      moved=metrics['moved'] / tokens,
      together=together,
    )

  def save(self) -> None:
    """Puts on disk what is not there yet."""
    self.writer.sync()
    if self._routing:
      self._routing.save()


def scalars_of(metrics: dict) -> dict[str, float]:
  """Returns those of a step's metrics that are numbers, whatever their name."""
  alone = lambda v: not isinstance(v, dict) and np.ndim(v) == 0
  return {k: float(v) for k, v in metrics.items() if alone(v)}


def _writer(
  config: RunConfig,
  workdir: Path,
  resumed: int,
  console: bool,
  writers: Sequence[ScalarWriter],
) -> MetricsWriter | NoMetrics:
  """Returns the writer of metrics; one that writes nothing but in process 0."""
  if not distributed.first():
    return NoMetrics()
  if config.wandb:
    writers = [*writers, WandB(workdir, config.wandb, as_json(config))]
  return MetricsWriter(
    workdir,
    writers=writers,
    total_steps=config.steps,
    tensorboard=config.tensorboard,
    console=console,
    resume_step=resumed or -1,
    say=say.warn,
  )


def _recalls(workdir: Path, resumed: int) -> list[float]:
  """Returns the recalls of the steps before, for a run that ends by them."""
  rows = metric_files.read(workdir) if resumed else []
  return [r['recall'] for r in rows if 'recall' in r and r['step'] <= resumed]


def _recorder(
  workdir: Path, model: Model, resume: int
) -> FlightRecorder | None:
  """Returns the recorder of routing; None if the model has no experts."""
  routed = [l for l in model.config.in_order() if l.block.routed]
  layers = [layer.number for layer in routed]
  if not layers:
    return None
  experts = routed[-1].block.ffn.experts
  path, per_layer = workdir / 'routing.npz', layer_losses.METRICS
  if resume > 0 and not path.exists():
    say.warn(f'{path} is gone: how steps up to {resume} were routed is lost')
  record = lambda: FlightRecorder(
    path,
    {n: per_layer[n].over for n in ('load', 'dropped', 'entropy', 'moved')}
    | {'bias': 'last'},
    coarse={'together': per_layer['together'].over},
    layers=layers,
    resume_step=resume,
    shapes={'load': (len(layers), experts), 'dropped': (len(layers),)},
  )
  try:
    return record()
  except DamagedFile as error:
    say.warn(
      f'{path} is damaged ({error.reason}): it is now {set_aside(path)}, and a'
      ' new one begins'
    )
    return record()
  except InputError as error:
    # An earlier version wrote it and recorded less: both files stay.
    kept = path.with_name(f'routing-until-{resume}.npz')
    kept = unused(kept, '.') if kept.exists() else kept
    path.rename(kept)
    say.warn(f'{error}; it is now {kept.name}')
    return record()


def router_biases(model: Model, buffers: dict) -> np.ndarray | None:
  """Returns the router biases [L E] in layer order; None if no layer has any.

  A layer without one has zeros.
  """
  out, found = [], False
  for layer in model.config.in_order():
    if not layer.block.routed:
      continue
    stack = layer.of(buffers, {})
    bias = stack.get('ffn', {}).get('router', {}).get('bias')
    found = found or bias is not None
    none = np.zeros(layer.block.ffn.experts, np.float32)
    out.append(none if bias is None else np.asarray(bias)[layer.repeat])
  return np.stack(out) if found else None
