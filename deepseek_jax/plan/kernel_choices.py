"""Lists which operations of a model run as kernels, or why not.

Traces a training step, prefill and one step of decoding on a mesh of fake
devices for a named GPU or TPU, and for one device the engine's loop of
decoding: nothing is compiled or allocated, and none of them is needed.
`python -m deepseek_jax.plan.kernel_choices` reads a question as JSON, in a
process of its own, as compiled does.
"""

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from deepseek_jax.config import from_dict, to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.infer import host_arrays
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.paging import paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.programs import Shape, plain
from deepseek_jax.infer.sampler import words
from deepseek_jax.model.stacks import unstack
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan import compiled
from deepseek_jax.plan.compiled import Program
from pallas_kernels import dispatch, target

PHASES = 'train', 'prefill', 'decode', 'engine'
_SLOTS = 16  # answers that the engine decodes together
# Compute capabilities of accelerators, by the letters of their names.
_CAPABILITIES = {'a': '8.0', 'h': '9.0', 'b': '10.0'}


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Describes what an operation runs as.

  Attributes:
    phase: one of PHASES.
    op: the operation.
    impl: 'gpu' or 'tpu' for a kernel, 'reference' for XLA's code.
    reason: why no kernel, or ''.
    shapes: of the arrays of one device; where there is no kernel those of all.
    times: how often it is called; layers that are scanned, or alike in a
      pattern, count once.
  """

  phase: str
  op: str
  impl: str
  reason: str
  shapes: str
  times: int


def capability(accelerator: str) -> str:
  """Returns the compute capability of a GPU such as 'h100'; 'tpu' of a TPU.

  Raises:
    InputError: its name tells none.
  """
  if re.match(r'v\d', accelerator):
    return 'tpu'
  known = re.match(r'g?([ahb])\d', accelerator)
  if not known:
    raise InputError(
      f'--cluster={accelerator}: its compute capability is not known; kernels'
      ' are listed for a100, h100, b200, v5p and their like'
    )
  return _CAPABILITIES[known[1]]


def small(grid: MeshConfig) -> MeshConfig:
  """Returns the mesh with fewer shards of batch and experts, and one stage.

  A mesh that a process can pretend: the sizes that cut heads, widths and
  sequences stay, for they decide what a kernel gets.
  """
  sizes = {'stage': 1}
  for axis in ('data', 'fsdp', 'expert'):
    size = getattr(grid, axis)
    while dataclasses.replace(grid, **sizes).devices > compiled.MOST:
      if size == 1:
        break
      # By its least factor, so that what the size divides it still does.
      size //= next(n for n in range(2, size + 1) if size % n == 0)
      sizes[axis] = size
  return dataclasses.replace(grid, **sizes)


def _phases(program: Program) -> Iterator[str]:
  """Yields each phase once it has been traced on the program's mesh."""
  compiled.trace(program)
  yield 'train'
  model, grid = build(program.model), program.mesh
  mesh = meshes.make(grid)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  rows = grid.ways('batch') * program.micro_batch
  tokens = lambda n: jax.ShapeDtypeStruct((rows, n), jnp.int32)
  cached = lambda v, t, c: model.apply(v, t, cache=c)
  with sharding.use(mesh, grid.rules, grid.exchange):
    slots = -(-(program.seq_len + 1) // 64) * 64
    empty = jax.eval_shape(lambda: model.init_cache(rows, slots))
    out = jax.eval_shape(cached, variables, tokens(program.seq_len), empty)
    yield 'prefill'
    jax.eval_shape(cached, variables, tokens(1), out.cache)
    yield 'decode'
  if grid.devices == 1:
    _trace_engine(model, variables, slots)
    yield 'engine'


def _trace_engine(model: Model, variables: dict, context: int) -> None:
  """Traces the engine's loop of decoding, with requests of `context` tokens."""
  cfg = EngineConfig(slots=_SLOTS, context=context)
  paged = paging(build_flat(model), cfg.page)
  pages = -(-context // paged.page)
  bucket = host_arrays.Bucket(_SLOTS, 1, pages)
  vocab = model.config.vocab_size
  ahead = host_arrays.Ahead(cfg.steps, 0, words(vocab))
  args = (
    jax.eval_shape(lambda v: unstack(model.config, model.cast(v)), variables),
    jax.eval_shape(lambda: paged.empty(_SLOTS * pages + 1, _SLOTS)),
    host_arrays.rows([], bucket, []),
    host_arrays.going([], bucket, [], ahead),
    host_arrays.draws([], bucket, paged.page, vocab),
  )
  shape = Shape(paged, cfg.steps, 0, False)
  jax.eval_shape(plain(model, shape).decode, *args)


def list_here(program: Program, device: str) -> list[Chosen]:
  """Traces in this process, which must see all devices of the mesh.

  Args:
    program: model, mesh and sizes.
    device: compute capability of a GPU, as '9.0', or 'tpu'.
  """
  chosen = []
  named = ('tpu',) if device == 'tpu' else ('cuda', device)
  with target.targeting(*named):
    phases = _phases(program)
    while True:
      with dispatch.recorded() as found:
        phase = next(phases, None)
      if phase is None:
        return chosen
      for choice, times in sorted(collections.Counter(found).items()):
        chosen.append(Chosen(phase, *choice, times))


def kernel_choices(program: Program, device: str) -> list[Chosen]:
  """Lists in a process of its own with as many fake devices as needed.

  Args:
    program, device: as in `list_here`.

  Raises:
    InputError: model and mesh do not fit.
    RuntimeError: the process failed; with its last lines.
  """
  asked = {'program': to_dict(program), 'device': device}
  done = compiled.run(
    ['-m', 'deepseek_jax.plan.kernel_choices'],
    program.mesh.devices,
    json.dumps(asked),
  )
  if done.returncode == InputError.status:
    raise InputError(done.stdout.splitlines()[-1])
  if done.returncode:
    lines = '\n'.join(done.stderr.splitlines()[-5:])
    raise RuntimeError(f'the steps are not traced:\n{lines}')
  return [Chosen(**c) for c in json.loads(done.stdout.splitlines()[-1])]


def kernels_of(chosen: list[Chosen], phase: str) -> list[str]:
  """Returns the names of the operations that run as kernels in a phase."""
  kernels = [c for c in chosen if c.impl in ('gpu', 'tpu')]
  return sorted({c.op for c in kernels if c.phase == phase})


if __name__ == '__main__':
  _asked = json.load(sys.stdin)
  try:
    _made = list_here(from_dict(Program, _asked['program']), _asked['device'])
  except InputError as _error:  # what only tracing finds
    print(' '.join(str(_error).split()))
    sys.exit(InputError.status)
  print(json.dumps([dataclasses.asdict(c) for c in _made]))
