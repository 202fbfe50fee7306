"""Builds a plan: everything that a configuration costs on a cluster.

`estimate` is the entry. Nothing here is fitted: every number is a formula of
the configuration, the cluster's stated figures and the recipe's assumptions.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.config import to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.pipeline.simulate import Durations
from deepseek_jax.plan import bubbles as pipeline
from deepseek_jax.plan import cost, hardware, memory
from deepseek_jax.plan import device_shares as mesh
from deepseek_jax.plan import flops as flop
from deepseek_jax.plan.assumptions import assumed
from deepseek_jax.plan.hardware import Cluster
from deepseek_jax.plan.parameters import ParameterCount, count_parameters
from deepseek_jax.plan.recipe import Recipe, check
from deepseek_jax.plan.wire.tensor_wire import uncounted
from deepseek_jax.plan.wire.traffic import Traffic, traffic

POLICIES = ('none', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Holds bounds of one training step, in seconds.

  Attributes:
    compute: executed FLOPs at the peak.
    bubble: idle time of the pipeline, with chunks at the peak.
    update: optimizer state read and written once.
    fast, slow: bytes over each link at its full rate.
    planned: model FLOPs at the recipe's utilization.
    exchange: bytes of dispatch and combine over their links, which are part
      of fast and slow.
    exposed: what of these no compute hides, at most; no bound counts with it.
  """

  compute: float
  bubble: float
  update: float
  fast: float
  slow: float
  planned: float
  exchange: float = 0.0
  exposed: float = 0.0

  @property
  def least(self) -> float:
    """Returns the time if all traffic hides behind compute, or the reverse."""
    return max(self.compute + self.bubble, self.fast, self.slow) + self.update

  @property
  def most(self) -> float:
    """Returns the time at full rates when nothing overlaps."""
    parts = (self.compute, self.bubble, self.update, self.fast, self.slow)
    return sum(parts)

  @property
  def reachable(self) -> bool:
    """Returns whether the planned time is possible at full rates."""
    return self.planned >= self.least

  @property
  def costed(self) -> float:
    """Returns the step time that the run's cost is computed with."""
    return max(self.planned, self.least)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Holds the cost of the whole run.

  Steps take the planned time, or the least step time where that is longer.

  Attributes:
    steps: to take.
    device_hours: over all devices.
    days: of wall-clock time.
    dollars: at the recipe's price.
    tokens_per_day: at that step time.
  """

  steps: int
  device_hours: float
  days: float
  dollars: float
  tokens_per_day: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Holds the size of a checkpoint and how long it takes to write.

  Attributes:
    bytes: on storage.
    seconds: to write them, all hosts at once.
    in_time: whether that is within the grace of a preemption.
  """

  bytes: int
  seconds: float
  in_time: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """Holds what a configuration costs on a cluster.

  Attributes:
    config, cluster, recipe: what was asked.
    parameters: exact counts.
    flops: counts of one training sequence, by key of flops.CONVENTIONS.
    standard_flops: per token by DeepSeek LLM's rule for dense models, without
      and with attention; None for a MoE.
    decode: FLOPs of a token at `recipe.cache_length`, by form.
    cache, cache_at_length: KV cache per token, and of a long sequence.
    memory: bytes by class of the fullest pipeline rank, by remat policy.
    traffic: bytes that a device sends in a step.
    method: bubble and memory multiples of the pipeline schedule.
    time: bounds of a step.
    cost: time and money of the run.
    checkpoint: its size and how long it takes.
    assumptions: what all of this rests on, in words.
    rollouts: what sampling adds, a `RolloutCost`; None where text is read.
  """

  config: TransformerConfig
  cluster: Cluster
  recipe: Recipe
  parameters: ParameterCount
  flops: dict[str, flop.Flops]
  standard_flops: tuple[float, float] | None
  decode: dict[str, int]
  cache: memory.CacheMemory
  cache_at_length: memory.CacheMemory
  memory: dict[str, dict[str, int]]
  traffic: Traffic
  method: pipeline.Method
  time: StepTime
  cost: Cost
  checkpoint: Checkpoint
  assumptions: tuple[str, ...]
  rollouts: Any = None

  @property
  def policy(self) -> str:
    """Returns the model's own remat policy."""
    return self.config.compute.remat

  @property
  def device_bytes(self) -> int:
    """Returns the bytes on the fullest device under the model's own policy."""
    return sum(self.memory[self.policy].values())

  @property
  def fits(self) -> bool:
    """Returns whether the fullest device's memory is large enough."""
    return self.device_bytes <= self.cluster.accelerator.memory.value

  @property
  def warnings(self) -> tuple[str, ...]:
    """Returns sentences on what is impossible or not counted."""
    t, out = self.time, ()
    missing = uncounted(self.config) if self.recipe.mesh.tensor > 1 else ()
    if missing:
      out = (
        f'mesh.tensor = {self.recipe.mesh.tensor}: sums inside'
        f' {", ".join(missing)} are not counted among the bytes sent',
      )
    if t.reachable:
      return out
    return (
      *out,
      f'{self.recipe.utilization:.1%} of the peak would be {t.planned:#.3g} s'
      f' a step, below the least of {t.least:#.3g} s: cost is counted with the'
      ' least',
    )

  def to_dict(self) -> dict:
    """Returns the report as JSON values, exact integers kept."""
    out = dataclasses.asdict(dataclasses.replace(self, config=None))
    out['config'] = to_dict(self.config)
    out['derived'] = {
      'device_bytes': self.device_bytes,
      'fits': self.fits,
      'step_least': self.time.least,
      'step_most': self.time.most,
      'step_costed': self.time.costed,
      'warnings': list(self.warnings),
      'gflops_per_token': {k: f.per_token / 1e9 for k, f in self.flops.items()},
    }
    return out


def _standard(
  config: TransformerConfig, length: int
) -> tuple[float, float] | None:
  """Returns standard_flops without and with attention; None for a MoE."""
  if any(block.routed for block, _ in flop.blocks(config)):
    return None
  args = (config.layers, config.dim, config.vocab_size)
  return flop.standard_flops(*args), flop.standard_flops(*args, length)


def _time(
  config: TransformerConfig,
  cluster: Cluster,
  recipe: Recipe,
  held: Mapping[str, int],
  sent: Traffic,
) -> tuple[StepTime, pipeline.Method]:
  """Returns step-time bounds and the schedule's row of V3's table 2."""
  run, grid, device = recipe.training, recipe.mesh, cluster.accelerator
  peak = device.bf16.value
  count = flop.count_flops(config, run.seq_len, mtp=True)
  # Utilization is quoted without multi-token prediction and recomputation.
  paper = flop.count_flops(config, run.seq_len)
  rate = peak * cluster.devices
  parts = grid.stage * grid.tensor * grid.context
  forward = sum(count.forward.values()) * run.micro_batch / parts / peak
  again = sum(count.repeated.values()) * run.micro_batch / parts / peak
  # Weight gradients are half of the backward pass; recomputation adds to it.
  times = Durations(forward, 2 * forward + again, forward)
  method = pipeline.method(run.schedule, grid.stage, times)
  bubble = method.bubble if grid.stage > 1 else 0.0
  state = sum(held[name] for name in memory.CLASSES[:4])
  exchange = sum(
    sent.on(link, 'expert ') / getattr(device, link).value
    for link in ('fast', 'slow')
  )
  step = StepTime(
    compute=recipe.batch * count.executed / rate,
    bubble=bubble,
    update=2 * state / device.memory_bandwidth.value,
    fast=sent.on('fast') / device.fast.value,
    slow=sent.on('slow') / device.slow.value,
    planned=recipe.batch * paper.training / (rate * recipe.utilization),
    exchange=exchange,
    exposed=recipe.exposed * exchange,
  )
  return step, method


def _cost(recipe: Recipe, cluster: Cluster, step: StepTime) -> Cost:
  """Returns the cost of the run; InputError where it is not finite."""
  tokens = recipe.batch * recipe.training.seq_len
  daily = cost.tokens_per_day(tokens, step.costed)
  hours = math.inf
  if daily:
    hours = cost.device_hours(recipe.tokens, cluster.devices, daily)
  if not math.isfinite(hours) or not math.isfinite(hours * recipe.dollars):
    raise InputError(
      f'tokens = {recipe.tokens}, dollars = {recipe.dollars}, utilization ='
      f' {recipe.utilization}: the cost is no finite number; choose others'
    )
  return Cost(
    steps=math.ceil(recipe.tokens / tokens),
    device_hours=hours,
    days=recipe.tokens / daily,
    dollars=hours * recipe.dollars,
    tokens_per_day=daily,
  )


def estimate(
  config: TransformerConfig,
  *,
  cluster: str | Cluster = 'h100',
  recipe: Recipe | None = None,
  rules: Mapping | None = None,
) -> Report:
  """Plans the training of a model; allocates and compiles nothing.

  Args:
    config: a model.
    cluster: such as 'h800x2048', or a Cluster.
    recipe: batch, mesh, schedule and assumptions; by default one device's.
    rules: logical axis -> mesh axis, by default mesh.RULES.

  Raises:
    InputError: names the field whose value does not fit model or cluster.
  """
  if isinstance(cluster, str):
    cluster = hardware.cluster(cluster)
  recipe = recipe or Recipe()
  check(config, cluster, recipe)
  run = recipe.training
  # Shares are the same under every policy.
  held, fullest = mesh.shares(config, recipe.mesh, rules), {}
  for policy in POLICIES:
    each = memory.device_bytes(
      config, recipe.mesh, run, policy=policy, held=held
    )
    # Pipeline ranks differ; the one with most bytes decides.
    fullest[policy] = max(each, key=lambda classes: sum(classes.values()))
  sent = traffic(
    config,
    recipe.mesh,
    run,
    batch=recipe.batch,
    node=int(cluster.accelerator.node.value),
    node_limited=recipe.node_limited,
    held=held,
  )
  mine = fullest[config.compute.remat]
  step, method = _time(config, cluster, recipe, mine, sent)
  size = memory.checkpoint_bytes(config, run.optimizer, held)
  # All hosts write their part at the same time.
  hosts = -(-cluster.devices // int(cluster.accelerator.host.value))
  seconds = size / (hosts * recipe.storage)
  if not math.isfinite(seconds):
    raise InputError(f'storage = {recipe.storage}: is too small; raise it')
  count = lambda seen: flop.count_flops(config, run.seq_len, seen=seen)
  return Report(
    config=config,
    cluster=cluster,
    recipe=recipe,
    parameters=count_parameters(config),
    flops={seen: count(seen) for seen in ('half', 'full', 'triangle')},
    standard_flops=_standard(config, run.seq_len),
    decode=flop.decode_flops(config, recipe.cache_length),
    cache=memory.cache(config),
    cache_at_length=memory.cache(config, recipe.cache_length),
    memory=fullest,
    traffic=sent,
    method=method,
    time=step,
    cost=_cost(recipe, cluster, step),
    checkpoint=Checkpoint(size, seconds, seconds <= recipe.grace),
    assumptions=assumed(config, cluster, recipe),
  )
