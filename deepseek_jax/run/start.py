"""Begins a run: anew, from another run's weights, or where it ended."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.data.ngrams import token_classes
from deepseek_jax.model.memory import ngram_hash
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import soundness
from deepseek_jax.run.checkpoint import Checkpoints, Restored, flatten
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.folder import config_of_source, load, restore
from deepseek_jax.run.staged_steps import StagedState, StagedSteps
from deepseek_jax.run.steps import Steps
from deepseek_jax.train import warm_start
from deepseek_jax.train.step import TrainState

_REFERENCE = 'reference'  # a copy of the model that the data stream holds


def start(
  config: RunConfig,
  steps: Steps | StagedSteps,
  checkpoints: Checkpoints,
  batches: datalib.Batches,
) -> tuple[TrainState | StagedState, int, str | None]:
  """Returns the state that a launch begins with; moves `batches` there.

  Returns:
    The state, the step that it was saved at (0: new), and the SHA-256 of the
    run's tokenizer, None where no checkpoint stores it.
  """
  step = checkpoints.newest_whole(say.warn)
  if step is None:
    state = steps.begin()
    if config.init_from:
      state = _warm(config.init_from, state, steps)
    return state, 0, None
  # Later steps are damaged, and this run will save under their numbers.
  checkpoints.set_aside_after(step)
  restored = restored_to(checkpoints, step, steps.like(), config, batches)
  where = checkpoints.directory / str(step)
  damage = soundness.of_checkpoint(restored.state, where)
  if damage and distributed.first():
    say.warn(damage)
  bound = restored.data.get('tokenizer_sha256')
  return steps.adopt(restored.state), step, bound


def restored_to(
  checkpoints: Checkpoints,
  step: int,
  like: TrainState,
  config: RunConfig,
  batches: datalib.Batches,
) -> Restored:
  """Returns the checkpoint of a step; moves `batches` to where it was saved.

  Args:
    checkpoints, step, like, config: see `folder.restore`.
    batches: of the run.
  """
  reference = {'params': like.params, 'buffers': like.buffers}
  held = functools.partial(_held, flatten({_REFERENCE: reference}))
  restored = restore(checkpoints, step, like, config, held)
  batches.set_state(restored.data)
  batches.take(_trees(restored.held, reference))
  return restored


def _held(like: dict, name: str, stored: Any) -> Any:
  """Returns how an array of the data stream is restored.

  Args:
    like: of the run's state, under the names of a reference policy.
    name: of the array.
    stored: its shape and dtype.
  """
  if name in like:  # a copy of the model lies where the model does
    return like[name]
  return np.broadcast_to(np.zeros((), stored.dtype), stored.shape)


def _trees(held: Mapping[str, Any], reference: Any) -> dict[str, Any]:
  """Returns the data stream's arrays as the trees that they were.

  Args:
    held: by dotted name.
    reference: of the shape of a reference policy.
  """
  out: dict[str, Any] = {}
  for name, array in held.items():
    tree, _, rest = name.partition('.')
    out.setdefault(tree, {})[rest] = array
  if _REFERENCE in out:
    leaves = [out[_REFERENCE][name] for name in flatten(reference)]
    out[_REFERENCE] = jax.tree.unflatten(jax.tree.structure(reference), leaves)
  return out


def check_source(
  config: RunConfig,
  model: Model,
  tokenizer: datalib.Tokenizer | datalib.ByteTokenizer,
) -> None:
  """Checks what is known of `init_from` before its weights are read.

  Raises:
    InputError: it holds no run with a checkpoint, or one that does not fit.
  """
  source = Path(config.init_from)
  theirs = config_of_source('init_from', str(source))
  warm_start.check_tokenizer(tokenizer, source)
  shapes = lambda m: jax.eval_shape(m.init, jax.random.key(0))
  # Shapes alone: raises if a weight has no place in this model.
  warm_start.variables(shapes(model), shapes(build(theirs.model)), str(source))


def _warm(
  source: str, state: TrainState | StagedState, steps: Steps | StagedSteps
) -> TrainState | StagedState:
  """Returns the state with the weights of another run."""
  begun = steps.whole(state)
  fresh = {'params': begun.params, 'buffers': begun.buffers}
  # Only weights come from there, and their names and shapes are compared.
  theirs = load(source, same_code=False).variables
  begun, new = warm_start.variables(fresh, theirs, source)
  if distributed.first():
    say.warn(f'weights are of {source}; fresh: {", ".join(new) or "none"}')
  return steps.with_variables(state, begun)


def with_classes(
  state: TrainState, resumed: int, model: Model, store: datalib.TokenStore
) -> TrainState:
  """Returns a new run's state with the tokens' classes in Engram's buffers.

  A resumed run has them already.
  """
  if resumed:
    return state
  classes = token_classes(store.tokenizer(), model.config.vocab_size)
  buffers = ngram_hash.with_classes(model.config.engram, state.buffers, classes)
  return state._replace(buffers=buffers)
