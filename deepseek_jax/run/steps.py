"""Runs the step of a run as one program; places its state and batches."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import config as configs
from deepseek_jax import data as datalib
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import placement, processor
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record.metrics import MetricsWriter, NoMetrics
from deepseek_jax.run import folder
from deepseek_jax.run.compilation import CompiledAhead, compiling
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import evaluate
from deepseek_jax.train.step import TrainState, train_step


class Steps:
  """Compiles train steps, one per batch size, and logs what compiling cost.

  Raises:
    InputError: the mesh does not fit the devices, the model or the batches.
  """

  def __init__(self, model: Model, config: RunConfig):
    """Chooses where arrays lie; compiles when first called."""
    check_mesh(config)
    self._where = placement.choose(config.mesh, model.abstract)
    self._model = model
    self._fresh = functools.partial(folder.fresh_state, config, model)
    step = train_step(model, config.train, config.objective)
    self._shared = config.objective.build(model).shared
    state = jax.eval_shape(self._fresh)
    where = self._where
    # Named, so that the donated state keeps its place from step to step.
    places = where.shardings(state, model.abstract), where.copied
    self._step = jax.jit(
      step,
      donate_argnums=0,
      out_shardings=places,
      compiler_options=processor.options('train', config.model.compute.xla),
    )
    # Equal models and recipes make one program, see `shared_programs`.
    same = model, *map(configs.key, (config.train, config.objective))
    self._compiled = _shared_programs().setdefault(
      (*same, configs.key(config.mesh), config.data.seq_len), {}
    )
    self._ahead: dict[int, CompiledAhead] = {}  # by sequences of a batch

  def __call__(
    self, state: TrainState, batch: dict, writer: MetricsWriter | NoMetrics
  ) -> tuple[TrainState, dict]:
    """Returns the next state and the metrics."""
    return self.compiled(state, batch, writer)(state, batch)

  def compiled(
    self, state: TrainState, batch: dict, writer: MetricsWriter | NoMetrics
  ) -> jax.stages.Compiled:
    """Returns the step for batches of this size."""
    rows = batch['tokens'].shape[0]
    if rows not in self._compiled:
      ahead = self._ahead.pop(rows, None)
      with compiling(rows, writer) as line, self._where.use():
        if ahead and ahead.takes(batch):
          self._compiled[rows] = ahead.program(line)
        else:
          self._compiled[rows] = self._step.lower(state, batch).compile()
    return self._compiled[rows]

  def compile_ahead(self, like: dict[str, np.ndarray]) -> None:
    """Begins to compile for batches like one, in a thread beside what follows.

    Tracing comes first, in this thread, whose settings of JAX count. Of several
    processes, which compile together, none begins, and none for a GPU, where
    the compiler times kernels.
    """
    rows = len(like['tokens'])
    alone = not distributed.several() and jax.default_backend() == 'cpu'
    if rows in self._compiled or not alone:
      return
    batch = self.batch(like, rows)
    with self._where.use():
      lowered = self._step.lower(self.like(), batch)
    self._ahead[rows] = CompiledAhead(lowered, batch)

  def begin(self) -> TrainState:
    """Returns the state of a new run, each part made where it lies."""
    return self._where.make(self._fresh, self._model.abstract)

  def like(self) -> TrainState:
    """Returns shapes, dtypes and shardings of what a checkpoint stores."""
    return self._where.abstract(self._fresh, self._model.abstract)

  def adopt(self, state: TrainState) -> TrainState:
    """Returns a restored state as steps take it."""
    return state

  def whole(self, state: TrainState) -> TrainState:
    """Returns a state as a checkpoint stores it."""
    return state

  def variables(self, state: TrainState) -> dict:
    """Returns what the model is applied with."""
    return {'params': state.params, 'buffers': state.buffers}

  def buffers(self, state: TrainState) -> dict:
    """Returns the model's buffers."""
    return state.buffers

  def with_variables(self, state: TrainState, variables: dict) -> TrainState:
    """Returns the state with other parameters and buffers."""
    # A copy, as the step is given its state away.
    placed = self._where.put(variables, self._model.abstract)
    return state._replace(**jax.tree.map(jnp.copy, placed))

  def block(self, size: int) -> tuple[int, int]:
    """Returns (block, blocks) of a batch's rows that this process reads."""
    return self._where.block(size)

  def batch(self, rows: dict[str, np.ndarray], size: int) -> dict:
    """Returns a global batch from the rows of this process."""
    whole = {name: rows[name] for name in self._shared if name in rows}
    cut = {name: rows[name] for name in rows.keys() - whole.keys()}
    return self._where.batch(cut, size) | whole

  def bits_per_byte(self, state: TrainState, heldout: datalib.Heldout) -> float:
    """Returns the bits per byte of held-out documents."""
    variables = {'params': state.params, 'buffers': state.buffers}
    with self._where.use():
      return evaluate.bits_per_byte(self._model, variables, heldout)


_programs: list[dict] = []  # of the innermost `shared_programs`, if any


def _shared_programs() -> dict:
  """Returns the programs that runs share; without sharing a new dict."""
  return _programs[-1] if _programs else {}


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
  """Lets runs inside, one after another, share steps that are compiled.

  Those are of equal models and recipes, as runs with several seeds have.
  """
  _programs.append({})
  try:
    yield
  finally:
    _programs.pop()


def check_mesh(config: RunConfig) -> None:
  """Raises InputError where batches or experts do not fit the mesh."""
  batch = config.train.batch
  # What fits these fits every size of the ramp.
  for rows in {batch.at(0), batch.after(batch.at(0)), batch.size}:
    length = config.data.seq_len
    meshes.check_batch(config.mesh, rows, length, batch.accumulate)
  exchange, ways = config.mesh.exchange, config.mesh.ways('experts')
  exchange.check(ways, config.model.dim, jax.default_backend())
