"""Compiles the training step for a mesh of devices that do not exist.

XLA partitions the program for as many fake CPU devices as asked for, and
reports what each would hold and send; no parameter is ever allocated. The
number of devices is fixed when JAX starts, so this is a process of its own
(`python -m deepseek_jax.plan.compiled` reads a Program as JSON).
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import at_least, from_dict, to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan.compiled_collectives import Total, collectives, totals
from deepseek_jax.plan.device_shares import AXES
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import BatchConfig
from deepseek_jax.train.step import TrainConfig, initial_state, train_step

MOST = 256  # devices; more take minutes and show nothing new
_WARNING = re.compile(
  r'Involuntary full rematerialization.*? from sharding (\{.*?\}) to (\{.*?\})'
  r' efficiently for HLO operation \S+ = (\S+?)\{.*?(?:op_name="([^"]*)"|$)',
  re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Program:
  """Describes the step that is compiled.

  Attributes:
    model: the configuration.
    mesh: axis sizes, rules, exchange of tokens; stages are separate programs,
      so stage must be 1.
    seq_len: tokens of a sequence.
    micro_batch: sequences per device at a time.
    optimizer: decides the moments' dtype.
    accumulate: micro-batches that a device works on, one by one.
  """

  model: TransformerConfig
  mesh: MeshConfig
  seq_len: int = 4096
  micro_batch: int = 1
  optimizer: OptimizerConfig = OptimizerConfig()
  accumulate: int = 1

  def __post_init__(self):
    """Raises InputError where a field is out of range; stage must be 1."""
    at_least(self, 'compile.', seq_len=1, micro_batch=1, accumulate=1)
    if self.mesh.stage > 1:
      raise InputError(
        f'compile: mesh.stage = {self.mesh.stage}: every stage is a program of'
        ' its own; compile one stage with mesh.stage = 1 and fewer layers'
      )
    if self.mesh.devices > MOST:
      raise InputError(
        f'compile: a mesh of {self.mesh.devices} devices: at most {MOST}'
      )
    meshes.check_batch(self.mesh, self.rows, self.seq_len, self.accumulate)

  @property
  def rows(self) -> int:
    """Returns the number of sequences of the step, over all devices."""
    return self.mesh.ways('batch') * self.micro_batch * self.accumulate


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Holds what XLA reports of the compiled step.

  Attributes:
    arguments, outputs, temporaries: bytes per device; the last are what the
      CPU backend needs, which an accelerator's may undercut or exceed.
    state: bytes per device of the arguments without the batch.
    collectives: by kind, those that every step runs.
    maybe: by kind, those in branches (further rounds of an exchange whose
      first did not hold all rows).
    loops: collectives in loops of unknown length, counted as one pass.
    rematerialized: XLA's warnings of 'involuntary full rematerialization',
      arrays that it gathers whole because it finds no way between two
      shardings: shape, operation, and these.
    seconds: to lower and compile.
  """

  arguments: int
  outputs: int
  temporaries: int
  state: int
  collectives: dict[str, Total]
  maybe: dict[str, Total]
  loops: int
  rematerialized: tuple[str, ...]
  seconds: float


def parse_mesh(text: str) -> MeshConfig:
  """Returns the mesh of '8x4x2' or 'fsdp=8,expert=4'.

  The first form lists sizes in the order data, fsdp, expert ...

  Raises:
    InputError: the text is neither; shows how to write it.
  """
  how = f'write 8x4x2, in the order {", ".join(AXES)}, or fsdp=8,expert=4'
  if '=' in text:
    pairs = [part.partition('=')[::2] for part in text.split(',')]
  else:
    sizes = text.split('x')
    if len(sizes) > len(AXES):
      raise InputError(f'compile = {text!r}: too many axes; {how}')
    pairs = list(zip(AXES, sizes))
  if not all(size.isdigit() for _, size in pairs):
    raise InputError(f'compile = {text!r}: {how}')
  seen = [name for name, _ in pairs]
  for name in seen:
    if name not in AXES:
      raise InputError(f'compile = {text!r}: no axis {name!r}; {how}')
    if seen.count(name) > 1:
      raise InputError(f'compile = {text!r}: {name} is given twice; {how}')
  return MeshConfig(**{name: int(size) for name, size in pairs})


def check(program: Program) -> None:
  """Raises InputError where model and mesh do not fit; compiles nothing."""
  grid, model = program.mesh, program.model
  meshes.check(grid, build(model).abstract)
  grid.exchange.check(grid.ways('experts'), model.dim, 'cpu')


def trace(
  program: Program, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.stages.Traced, Any, dict[str, jax.ShapeDtypeStruct]]:
  """Returns the traced step, its abstract state and its abstract batch.

  The process must see as many devices as the mesh has, or be given them.
  """
  check(program)
  model, config = build(program.model), program.mesh
  batch = BatchConfig(program.rows, accumulate=program.accumulate)
  cfg = TrainConfig(1e12, batch, program.optimizer)
  mesh = meshes.make(config, devices)
  state = jax.eval_shape(
    lambda key: initial_state(model, cfg, model.init(key)), jax.random.key(0)
  )
  where = meshes.shardings(mesh, config.rules, model.abstract, state)
  place = lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)
  state = jax.tree.map(place, state, where)
  over = meshes.names(config.rules.get('batch')) or None
  cut = NamedSharding(mesh, PartitionSpec(over, None))
  row = jax.ShapeDtypeStruct(
    (program.rows, program.seq_len + 1), jnp.int32, sharding=cut
  )
  batch = {'tokens': row}
  # The state is donated, as in training: outputs take the arguments' place.
  step = jax.jit(
    train_step(model, cfg),
    donate_argnums=0,
    out_shardings=(where, None),
    keep_unused=True,
  )
  with sharding.use(mesh, config.rules, config.exchange):
    return step.trace(state, batch), state, batch


def lower(
  program: Program, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.stages.Lowered, Any, dict[str, jax.ShapeDtypeStruct]]:
  """Returns what `trace` does, the step lowered."""
  traced, state, batch = trace(program, devices)
  return traced.lower(), state, batch


def _bytes(tree: Any) -> int:
  """Returns the bytes of a tree of sharded arrays on one device."""
  return sum(
    math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
    for s in jax.tree.leaves(tree)
  )


def compile_here(program: Program) -> Compiled:
  """Compiles in this process, which must see all devices of the mesh."""
  start = time.perf_counter()
  lowered, state, _ = lower(program)
  # The backend's own passes move no collective and no argument: skipped.
  compiled = lowered.compile({'xla_backend_optimization_level': 0})
  found = collectives(compiled.as_text(), program.mesh.devices)
  memory = compiled.memory_analysis()
  return Compiled(
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.temp_size_in_bytes,
    _bytes(state),
    totals(c for c in found if not c.maybe),
    totals(c for c in found if c.maybe),
    sum(c.loop for c in found),
    (),
    time.perf_counter() - start,
  )


def warnings(text: str) -> list[str]:
  """Returns XLA's warnings of full rematerializations in `text`, shortened."""
  return [
    f'{shape} {operation or "(unnamed)"}: {before} -> {after}'
    for before, after, shape, operation in _WARNING.findall(text)
  ]


def run(
  argv: list[str], devices: int, text: str = ''
) -> subprocess.CompletedProcess[str]:
  """Runs Python in a process that sees `devices` fake CPU devices.

  Args:
    argv: arguments of the interpreter.
    devices: how many CPU devices JAX finds there.
    text: what the process reads on stdin.

  Returns:
    The finished process, with stdout and stderr as text.
  """
  # The program is read, never run: LLVM's costly passes are left out.
  flags = (
    f'--xla_force_host_platform_device_count={devices}'
    ' --xla_llvm_disable_expensive_passes=true'
  )
  own = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags,
    'TF_CPP_MIN_LOG_LEVEL': '0',  # its warnings are read
  }
  return subprocess.run(
    [sys.executable, *argv],
    input=text,
    env=os.environ | own,
    capture_output=True,
    text=True,
    check=False,
  )


def compile_step(program: Program) -> Compiled:
  """Compiles in a process of its own with as many fake devices as needed.

  Raises:
    InputError: model and mesh do not fit.
    RuntimeError: the process failed; with its last lines.
  """
  done = run(
    ['-m', 'deepseek_jax.plan.compiled'],
    program.mesh.devices,
    json.dumps(to_dict(program)),
  )
  if done.returncode == InputError.status:
    raise InputError(done.stdout.splitlines()[-1])
  if done.returncode:
    lines = '\n'.join(done.stderr.splitlines()[-5:])
    raise RuntimeError(f'the step does not compile:\n{lines}')
  made = json.loads(done.stdout.splitlines()[-1])
  for name in ('collectives', 'maybe'):
    made[name] = {kind: Total(*t) for kind, t in made[name].items()}
  made['rematerialized'] = tuple(warnings(done.stderr))
  return Compiled(**made)


if __name__ == '__main__':
  try:
    _made = compile_here(from_dict(Program, json.load(sys.stdin)))
  except InputError as _error:  # what only tracing finds
    print(' '.join(str(_error).split()))
    sys.exit(InputError.status)
  print(json.dumps(dataclasses.asdict(_made)))
