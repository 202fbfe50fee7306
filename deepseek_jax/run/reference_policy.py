"""Keeps the weights that the KL term compares the policy with.

They lie where the policy's do, and in every checkpoint of the run.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import data as datalib
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel.placement import Placement
from deepseek_jax.run import folder
from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import warm_start


class ReferencePolicy:
  """Holds the reference of a run.

  Attributes:
    weights: {'params': ..., 'buffers': ...}; None before the first round.
  """

  def __init__(self, config: RunConfig, model: Model, where: Placement):
    """Takes the run, its model, and where its arrays lie."""
    self._config, self._model, self._where = config, model, where
    self.weights: dict | None = None

  def settle(self, updates: int, policy: dict) -> dict:
    """Returns the reference of a round.

    Args:
      updates: of the run, before the round.
      policy: the weights then.
    """
    every = self._config.objective.reference_every
    if every and updates and updates % every == 0:
      self.weights = _copied(policy)
    elif self.weights is None:
      self.weights = self._begun(updates, policy)
    return self.weights

  def _begun(self, updates: int, policy: dict) -> dict:
    """Returns the reference that a run begins with."""
    source = self._config.rollouts.reference
    if source:
      held = folder.load(source, same_code=False).variables
      return self._where.put(held, self._model.abstract)
    # A checkpoint of an earlier version holds none.
    return _copied(policy) if updates == 0 else self.first()

  def first(self) -> dict:
    """Returns the weights that the run began with."""
    make = functools.partial(
      lambda seed: self._model.init(jax.random.key(seed)), self._config.seed
    )
    fresh = self._where.make(make, self._model.abstract)
    source = self._config.init_from
    if source:
      theirs = folder.load(source, same_code=False).variables
      fresh, _ = warm_start.variables(fresh, theirs, source)
    return self._where.put(fresh, self._model.abstract)


def _copied(variables: dict) -> dict:
  """Returns a copy: a step is given its state away."""
  return jax.tree.map(jnp.copy, variables)


def check(config: RunConfig, model: Model, tokenizer: Any) -> None:
  """Checks the run that `rollouts.reference` names before it is read.

  Raises:
    InputError: it holds no run, or one of another vocabulary or model.
  """
  source = config.rollouts.reference
  named = f'rollouts.reference = {source!r}'
  theirs = folder.config_of_source('rollouts.reference', source)
  try:
    other = datalib.from_file(str(Path(source) / 'tokenizer.json'))
  except InputError as error:
    raise InputError(f'{named}: {error}') from None
  sizes = theirs.model.vocab_size, config.model.vocab_size
  if sizes[0] != sizes[1] or other.sha256 != tokenizer.sha256:
    raise InputError(
      f'{named}: its vocabulary is another ({sizes[0]} tokens there,'
      f' {sizes[1]} here, tokenizer {other.sha256[:8]} there,'
      f' {tokenizer.sha256[:8]} here), so log-probs can not be compared; name a'
      ' run with the tokenizer of this one'
    )
  shapes = lambda built: {
    name: leaf.shape
    for name, leaf in flatten(
      jax.eval_shape(built.init, jax.random.key(0))
    ).items()
  }
  mine, their = shapes(model), shapes(folder.build(theirs.model))
  wrong = sorted(
    name for name in {*mine, *their} if mine.get(name) != their.get(name)
  )
  if wrong:
    raise InputError(
      f'{named}: {wrong[0]} is {their.get(wrong[0], "missing")} there and'
      f' {mine.get(wrong[0], "missing")} here; name a run of the same model'
    )
