"""Defines what a run optimises, as an argument of the training step.

An objective is anything with `build(model) -> Objective`. It gets the hidden
states, the head and the batch, and returns a loss; what layers add by
themselves (balance, indexers) is in `layer_losses`. The same objective runs on
one device, on a mesh and in the last stage of a pipeline.
Legend: B sequences, T tokens, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from deepseek_jax.model.mtp import Ahead
from deepseek_jax.parallel import per_device
from deepseek_jax.record.metric import Metric
from deepseek_jax.train.cross_entropy import linear_cross_entropy


class Inputs(NamedTuple):
  """Holds what the model reads of a batch, and what it should predict."""

  tokens: jax.Array  # [B T] int32
  segments: jax.Array | None  # [B T] int32; None: each row is one document
  positions: jax.Array | None  # [B T] int32; None: from each document's start
  labels: jax.Array  # [B T] int32
  weights: jax.Array  # [B T] float32, of each label in the loss
  batch: Mapping[str, jax.Array]  # all that the batch holds
  routes: jax.Array | None = None  # [B T L K], see model.apply


class Predictions(NamedTuple):
  """Holds what the model computes from the inputs."""

  hidden: jax.Array  # [B T D], after the final norm
  head: jax.Array  # [D V]
  aux: dict  # 'mtp_hidden', where tokens further ahead are predicted


class Shares(NamedTuple):
  """Describes how a micro-batch's loss counts in that of its global batch."""

  denominator: jax.Array  # sum of the weights of the global batch
  micro_batches: int  # in the global batch; all of one size
  mtp_weight: jax.Array  # lambda
  # Share of the global batch's rows that hold a token; of None
  # `loss_and_metrics` takes that of the rows that it is given.
  filled: jax.Array | None = None


def total_weight(inputs: Inputs) -> jax.Array:
  """Returns the sum of a batch's weights, 1 where nothing weighs.

  No floor: weights of any size give the same loss.
  """
  total = inputs.weights.sum()
  return jnp.where(total > 0, total, 1.0)


def filled_rows(inputs: Inputs) -> jax.Array:
  """Returns the share of a batch's rows that hold a token, 1 of no such row.

  Means over rows are divided by it: a row of padding alone counts nowhere.
  """
  if inputs.segments is None:
    return jnp.float32(1)
  share = (inputs.segments > 0).any(axis=1).mean(dtype=jnp.float32)
  return jnp.where(share > 0, share, 1.0)


def shares_of(
  inputs: Inputs, micro_batches: int, mtp_weight: jax.typing.ArrayLike
) -> Shares:
  """Returns how each micro-batch of a global batch counts."""
  return Shares(
    total_weight(inputs), micro_batches, mtp_weight, filled_rows(inputs)
  )


def next_token(batch: Mapping[str, jax.Array]) -> Inputs:
  """Returns the inputs and labels of next-token prediction.

  The batch is read as `model.apply` reads it: without segments each row is one
  document and nothing is padding; with them tokens attend to their own segment
  alone, and segment 0 is padding. A token is predicted from the one before it
  in its document.

  Args:
    batch: 'tokens' [B T+1] int32, and maybe 'segments' and 'positions', alike.
  """
  tokens, segments = batch['tokens'], batch.get('segments')
  ahead, positions = tokens[:, 1:], batch.get('positions')
  if positions is not None:
    positions = positions[:, :-1]
  if segments is None:
    weights = jnp.ones(ahead.shape, jnp.float32)
    return Inputs(tokens[:, :-1], None, positions, ahead, weights, batch)
  # No token is predicted across a document's border, nor is padding.
  inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  return Inputs(
    tokens[:, :-1],
    segments[:, :-1],
    positions,
    ahead,
    inside.astype(jnp.float32),
    batch,
  )


class Objective(NamedTuple):
  """Describes a loss of a model.

  Attributes:
    loss: (Predictions, Inputs, Shares) -> (scalar, metrics). This
      micro-batch's share of the global batch's loss: a sum over tokens divided
      by `shares.denominator`. Metrics are such shares too, scalars by name;
      'loss' is the loss unless they say otherwise.
    inputs: batch -> Inputs; pure, as every stage of a pipeline calls it.
    mtp: tokens further ahead are predicted, where the model can; if not, the
      blocks that predict them keep their values. 'alone': they teach these
      blocks and nothing before them.
    metrics: describes those of `loss`, by name.
    moves_biases: loads move the biases of routers.
    comparable: a step's loss and gradient norm are like those before, so that
      one far above them is an explosion; if not, finiteness alone is judged.
    shared: names of a batch's arrays that belong to no row of it: every
      micro-batch gets them whole.
  """

  loss: Callable[[Predictions, Inputs, Shares], tuple[jax.Array, dict]]
  inputs: Callable[[Mapping[str, jax.Array]], Inputs] = next_token
  mtp: Ahead = True
  metrics: Mapping[str, Metric] = {}
  moves_biases: bool = True
  comparable: bool = True
  shared: tuple[str, ...] = ()

  @property
  def frozen(self) -> tuple[str, ...]:
    """Returns names of parameters that no update reaches."""
    return () if self.mtp else ('mtp',)

  def __call__(
    self, predictions: Predictions, inputs: Inputs, shares: Shares
  ) -> tuple[jax.Array, dict]:
    """Returns the loss and its metrics.

    Raises:
      InputError: a metric is no scalar.
    """
    loss, metrics = self.loss(predictions, inputs, shares)
    metrics = {'loss': loss, **metrics}
    for name, value in {'the loss': loss, **metrics}.items():
      if jnp.ndim(value):
        raise InputError(
          f'objective: {name} has the shape {list(jnp.shape(value))}; return'
          ' scalars, each a share of the global batch'
        )
    return loss, metrics


class ObjectiveConfig(Protocol):
  """Describes an objective, and builds it."""

  def build(self, model: Any) -> Objective:
    """Returns the objective for `model`, a `Model`."""


METRICS = {
  'loss': Metric('Loss', 'nats per token'),
  'mtp_loss': Metric('MTP loss', 'nats per token'),
}


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
  """Describes next-token prediction, with MTP if the model has it.

  DeepSeek-V3, section 2.2.
  """

  def build(self, model: Any) -> Objective:
    """Returns the objective; it asks nothing of the model."""
    del model
    return Objective(_pretraining, metrics=METRICS)


def _pretraining(
  predictions: Predictions, inputs: Inputs, shares: Shares
) -> tuple[jax.Array, dict]:
  """Returns next-token cross entropy plus weighted MTP loss, and metrics."""
  hidden, head, aux = predictions
  # The main loss, of this micro-batch, over the global batch's weights.
  main = _cross_entropy(hidden, head, inputs.labels, inputs.weights)
  metrics = {'loss': main / shares.denominator}
  loss = metrics['loss']
  if 'mtp_hidden' in aux:
    extra = mtp_loss(predictions, inputs)
    metrics['mtp_loss'] = extra / shares.denominator  # by all tokens, as in V3
    loss += shares.mtp_weight * metrics['mtp_loss']
  return loss, metrics


def _cross_entropy(
  hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
  """Returns the weighted sum over tokens: [B T D], [D V], [B T], [B T]."""
  one = lambda hidden, labels, weights, head: linear_cross_entropy(
    hidden, head, labels, weights
  )
  return per_device.token_sum(one, (hidden, labels, weights), head)


def mtp_loss(predictions: Predictions, inputs: Inputs) -> jax.Array:
  """Returns the sum of the MTP cross entropies, averaged over depths.

  Depth k at i predicts label i+k, where that lies in i's document.
  """
  states, head = predictions.aux['mtp_hidden'], predictions.head
  labels, weights = inputs.labels, inputs.weights
  segments = inputs.segments
  total = jnp.float32(0)
  T = labels.shape[1]
  alive = jnp.ones(labels.shape, bool)
  for depth, hidden in enumerate(states, start=1):
    # What rolls in from the row's start is masked by `inside`.
    back = lambda a, by: jnp.roll(a, -by, axis=1)
    inside = jnp.arange(T) < T - depth
    shifted = jnp.roll(labels, -depth, axis=1)
    # A target counts only if all tokens up to it are in i's document. It has a
    # weight of its own: those before it need not be trained on.
    if segments is not None:
      alive &= back(segments, depth) == back(segments, depth - 1)
    own = back(weights, depth)
    total += _cross_entropy(hidden, head, shifted, own * (alive & inside))
  return total / max(len(states), 1)
