"""Describes how a model is trained, and whether a cluster can train it so."""

import dataclasses

from deepseek_jax.config import above, at_least, within
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan import memory
from deepseek_jax.plan.device_shares import Mesh
from deepseek_jax.plan.hardware import Cluster


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Describes what a configuration of a model leaves open.

  Attributes:
    tokens: to train on.
    batch: sequences per step, over all devices.
    training: sequence length, micro-batch, optimizer, schedule.
    mesh: axis sizes; their product must be the cluster's devices.
    node_limited: tokens cross to each node at most once (V3).
    utilization: share of the peak that model FLOPs (half convention) reach.
    dollars: per device and hour.
    cache_length: tokens at which the KV cache is also given.
    grace: seconds between the notice of a preemption and the end.
    storage: bytes/s that one host writes to storage.
    exposed: share of the time of dispatch and combine in which nothing is
      computed; by default the most that XLA's schedule of V3's layers leaves
      (`python -m benchmarks.schedule`).
  """

  tokens: float = 1e12
  batch: int = 1024
  training: memory.Training = memory.Training()
  mesh: Mesh = Mesh()
  node_limited: bool = True
  utilization: float = 0.4
  dollars: float = 2.0
  cache_length: int = 131072
  grace: float = 30.0
  storage: float = 2e9
  exposed: float = 0.77

  def __post_init__(self):
    """Raises InputError where a number is out of its range."""
    above(self, tokens=0, grace=0, storage=0)
    at_least(self, batch=1, cache_length=1, dollars=0)
    within(self, utilization=(0, 1), ends='(]')
    within(self, exposed=(0, 1))


def check(config: TransformerConfig, cluster: Cluster, recipe: Recipe) -> None:
  """Raises InputError where recipe and cluster do not fit each other."""
  grid, run = recipe.mesh, recipe.training
  if grid.devices != cluster.devices:
    raise InputError(
      f'mesh of {grid.devices} devices: the cluster has {cluster.devices};'
      ' make the product of the axes equal, or plan for another cluster'
      f' (--cluster=h800x{grid.devices})'
    )
  each = grid.batch * run.micro_batch
  if recipe.batch % each:
    raise InputError(
      f'batch = {recipe.batch}: must be a multiple of data * fsdp * expert *'
      f' micro_batch = {each}'
    )
  if run.seq_len % grid.context:
    raise InputError(
      f'seq_len = {run.seq_len}: must divide by mesh.context = {grid.context}'
    )
  micro = recipe.batch // each
  if run.both_ends and grid.stage > 1 and micro < 2 * grid.stage:
    raise InputError(
      f'batch = {recipe.batch}: gives {micro} micro-batches per device;'
      f' {run.schedule} needs at least 2 * mesh.stage = {2 * grid.stage}'
    )
  if run.schedule == 'dualpipe' and grid.stage > 1 and micro % 2:
    raise InputError(
      f'batch = {recipe.batch}: gives {micro} micro-batches per device;'
      f' dualpipe needs an even number; set batch to {recipe.batch + each}'
    )


def v3_recipe(utilization: float = 0.389) -> Recipe:
  """Returns DeepSeek-V3's recipe: 16 pipeline ranks, 64-way experts, ZeRO-1.

  arXiv:2412.19437 sections 3.2, 3.3 and 4.2; batch after its ramp; the
  utilization is that of arXiv:2505.09343, table 4.
  """
  return Recipe(
    tokens=14.8e12,
    batch=15360,
    mesh=Mesh(data=2, expert=64, stage=16),
    training=memory.Training(
      seq_len=4096,
      optimizer=memory.OptimizerConfig(moments='bfloat16'),
      zero=1,
      dispatch='float8',
      schedule='dualpipe',
    ),
    utilization=utilization,
  )
