"""One training step on fake devices, against the same step on one.

    python -m tests.scale.invariance MODEL MESH ...

prints, per mesh, the greatest differences of loss, gradients, router biases,
expert loads and drops, and how the parameters were made.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.model.experts.capacity import CapacityConfig
from deepseek_jax.parallel import placement
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.staged_steps import StagedSteps
from deepseek_jax.train import cross_entropy as losses
from deepseek_jax.train import step as train
from deepseek_jax.train.gate import GateConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)
from deepseek_jax.train.step import TrainConfig
from tests import tiny

B, T = 8, 12
A2A = ExchangeConfig(factor=1.0)
GATHER = ExchangeConfig('all_gather')
HOPS = ExchangeConfig('two_hop', nodes=2, factor=1.0)
MESHES = {
  'data=2': MeshConfig(data=2),
  'fsdp=2': MeshConfig(fsdp=2),
  'tensor=2': MeshConfig(tensor=2),
  'context=2': MeshConfig(context=2),
  'expert=2': MeshConfig(expert=2, exchange=A2A),
  'expert=4 two hops': MeshConfig(expert=4, exchange=HOPS),
  'fsdp=2 tensor=2': MeshConfig(fsdp=2, tensor=2),
  'data=2 expert=2 gathered': MeshConfig(data=2, expert=2, exchange=GATHER),
  'data=8': MeshConfig(data=8),
  'fsdp=8': MeshConfig(fsdp=8),
  'expert=8 two hops': MeshConfig(expert=8, exchange=HOPS),
  'expert=4 tensor=2': MeshConfig(expert=4, tensor=2),
  'data=2 expert=4 two hops': MeshConfig(data=2, expert=4, exchange=HOPS),
  'fsdp=2 expert=2 context=2': MeshConfig(
    fsdp=2, expert=2, context=2, exchange=A2A
  ),
  'data=2 fsdp=2 tensor=2': MeshConfig(data=2, fsdp=2, tensor=2),
  'expert=2 context=2 tensor=2': MeshConfig(
    expert=2, context=2, tensor=2, exchange=GATHER
  ),
  'context=4 expert=2': MeshConfig(context=4, expert=2, exchange=A2A),
  'stage=2': MeshConfig(stage=2),
  'stage=2 expert=2': MeshConfig(stage=2, expert=2, exchange=A2A),
  'stage=2 data=2 tensor=2': MeshConfig(stage=2, data=2, tensor=2),
  'stage=2 fsdp=2 context=2': MeshConfig(stage=2, fsdp=2, context=2),
  'stage=4': MeshConfig(stage=4),
  'stage=2 dualpipe': MeshConfig(stage=2, schedule='dualpipe'),
  'stage=2 expert=2 dualpipe': MeshConfig(
    stage=2, expert=2, schedule='dualpipe', exchange=A2A
  ),
  'stage=4 tensor=2 dualpipe': MeshConfig(
    stage=4, tensor=2, schedule='dualpipe'
  ),
}
RECIPE = TrainConfig(
  tokens=1e6,
  batch=BatchConfig(B),
  # Smooth in the gradient: with a tiny eps, Adam divides rounding by rounding.
  optimizer=OptimizerConfig(eps=1e-3, decay=0.01),
  schedule=ScheduleConfig('constant', peak=0.01, warmup=0),
  gate=GateConfig(warmup=1000),
  mtp_weight=SwitchConfig(0.3, 0.0, 0.5),
  bias_rate=SwitchConfig(0.01, 0.0, 0.25),
)


@functools.cache
def model(name: str) -> ds.Model:
  """Experts in groups, biases, balance losses, drops, MTP, recomputation."""
  config = tiny.config(name)
  if name == 'step':  # the quick one
    config = ds.changed(config, {'mtp.depth': 0})
  moe = dataclasses.replace(
    config.moe, capacity=CapacityConfig(factor=0.8, devices=4, exempt=0.25)
  )
  compute = dataclasses.replace(config.compute, remat='full')
  return ds.build(dataclasses.replace(config, moe=moe, compute=compute))


def state(name: str):
  """With weights that keep rounding small."""
  one = lambda a: jnp.asarray(a) * (0.5 if a.ndim > 1 else 1.0)
  variables = jax.tree.map(one, tiny.draw(model(name)))
  return train.initial_state(model(name), RECIPE, variables)


def recipe(micro_batches: int) -> TrainConfig:
  return ds.changed(RECIPE, {'batch.accumulate': micro_batches})


def micro_batches(mesh: MeshConfig) -> int:
  """As few as its pipeline can do with."""
  return mesh.stage * (2 if mesh.schedule == 'dualpipe' else 1)


def through_stages(name: str, mesh: MeshConfig):
  """As `step`, through a pipeline."""
  data = datalib.DataConfig(
    vocab_size=tiny.VOCAB, seq_len=T, cross_document=False
  )
  cfg = recipe(micro_batches(mesh))
  config = RunConfig(model(name).config, data, cfg, mesh=mesh)
  steps = StagedSteps(model(name), config)
  begun = steps.adopt(jax.device_get(state(name)))
  batch = tiny.documents(B, T + 1, 0, 3)
  done, metrics = steps(begun, batch, NoMetrics())
  return steps.whole(done), metrics


def step(name: str, mesh: MeshConfig):
  """(state after, metrics) of a step on the first devices, on the host."""
  devices = jax.devices()[: mesh.devices]
  where = placement.over(mesh, model(name).abstract, devices)
  begun = state(name)
  begun = jax.device_put(begun, where.shardings(begun, model(name).abstract))
  batch = where.batch(tiny.documents(B, T + 1, 0, 3), B)
  run = train.train_step(model(name), RECIPE)
  with where.use():
    compiled = jax.jit(run).lower(begun, batch).compile()
  return jax.device_get(compiled(begun, batch))


def made(mesh: MeshConfig) -> dict:
  """How parameters come to be: their numbers, and what a device holds."""
  config = ds.changed(tiny.config('step'), {'vocab_size': 2048, 'dim': 64})
  wide = ds.build(config)
  where = placement.over(mesh, wide.abstract, jax.devices()[: mesh.devices])
  make = functools.partial(wide.init, jax.random.key(0))
  got, want = where.make(make, wide.abstract), jax.jit(make)()
  same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), got, want)
  places = where.shardings(want, wide.abstract)
  with where.use():
    memory = (
      jax.jit(make, out_shardings=places).lower().compile().memory_analysis()
    )
  held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(got))
  return {
    'same': all(jax.tree.leaves(same)),
    'whole': sum(a.nbytes for a in jax.tree.leaves(want)),
    'held': held,
    'output': memory.output_size_in_bytes,
    'scratch': memory.temp_size_in_bytes,
  }


def cross_entropy() -> float:
  """Gap of the head's loss in chunks, log-probabilities and gradients."""
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(48, 8)), rng.normal(size=(8, 16))
  labels = rng.integers(0, 16, 48)
  weights = rng.uniform(size=48).astype(np.float32)

  def loss(hidden, head):
    logs = losses.token_log_probs(hidden, head, labels, 5)
    total = losses.linear_cross_entropy(hidden, head, labels, weights, 5)
    return total + (logs * jnp.arange(48)).mean(), logs

  def run():  # traced anew
    args = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    both = jax.value_and_grad(lambda *a: loss(*a), (0, 1), has_aux=True)
    return jax.device_get(jax.jit(both)(*args))

  with placement.over(MeshConfig(data=2, fsdp=2)).use():
    got = run()
  return gap(got, run())


def gap(a, b) -> float:
  """Greatest difference of two trees, each leaf over its greatest value."""
  one = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
  return tiny.largest(map(one, jax.tree.leaves(a), jax.tree.leaves(b)))


def compare(name: str, mesh: str) -> dict:
  run = step if MESHES[mesh].stage == 1 else through_stages
  got, seen = run(name, MESHES[mesh])
  want, wanted = one_device(name)
  terms = [k for k in ('loss', 'mtp_loss', 'balance_loss') if k in wanted]
  return {
    'loss': tiny.largest(gap(seen[k], wanted[k]) for k in terms),
    # The first moments are the gradients, clipped, times 0.1.
    'gradient': gap(got.moments[1].mu, want.moments[1].mu),
    'gradient norm': gap(seen['grad_norm'], wanted['grad_norm']),
    'bias': gap(got.buffers, want.buffers),
    'load': gap(
      seen['load'].astype(np.float64), wanted['load'].astype(np.float64)
    ),
    'dropped': int(np.abs(seen['dropped'] - wanted['dropped']).max()),
    'moved': gap(want.buffers, jax.device_get(state(name).buffers)),
    'drops': int(wanted['dropped'].sum()),
  }


@functools.cache
def one_device(name: str):
  """All at once, so that a pipeline's micro-batches change nothing either."""
  return step(name, MeshConfig())


def main(name, *meshes):
  found = {mesh: compare(name, mesh) for mesh in meshes}
  beside = {
    'made': made(MeshConfig(fsdp=4, tensor=2)),
    'cross entropy': cross_entropy(),
  }
  print(json.dumps(found | beside))


if __name__ == '__main__':
  main(*sys.argv[1:])
