"""Computes one stage of a pipeline, in training and in evaluation.

Legend: B sequences, T tokens.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.model import kernels
from deepseek_jax.model.context import Context, context
from deepseek_jax.pipeline.stages import Stage
from deepseek_jax.train.evaluate import negative_log_likelihood
from deepseek_jax.train.layer_losses import attention_losses, routing_losses
from deepseek_jax.train.objective import Objective, Predictions, Shares


def trained(
  stage: Stage,
  variables: dict,
  stream: jax.Array | None,
  batch: dict,
  shares: Shares,
  objective: Objective,
) -> tuple:
  """Returns a stage's part of the loss of a micro-batch, for jax.vjp.

  Args:
    stage: whose.
    variables: in the compute dtype.
    stream: [B T ...] of the stage before; None for the first.
    batch: as in `loss_and_metrics`; of one micro-batch.
    shares: how it counts.
    objective: what is optimised; its loss is the last stage's.

  Returns:
    ((stream, loss), metrics): the stream is None for the last stage; the
    loss is this stage's share of the global batch's, and the metrics are
    those of `loss_and_metrics` that the stage knows.
  """
  module = stage.functional.merge(variables)
  inputs = objective.inputs(batch)
  if inputs.routes is not None:
    raise InputError(
      'mesh.stage: a pipeline does not replay routes; set keep_routing = False'
      ' or mesh.stage = 1'
    )
  ctx = context(
    inputs.tokens,
    inputs.segments,
    stage.config.vocab_size,
    positions=inputs.positions,
    train=True,
  )
  # [B T ...] -> [B T ...]; statistics by segment, of this stage's layers.
  stream, statistics = _through(stage, module, stream, ctx)
  aux, loss, metrics = {'segments': statistics}, jnp.float32(0), {}
  # The last stage ends in the objective's loss, the others pass the stream on.
  if stage.last:
    with _computing(stage):
      hidden, ahead = module.leave(stream, ctx, mtp=objective.mtp)
    aux, stream = aux | ahead, None
    predictions = Predictions(hidden, module.head_weight(), aux)
    loss, metrics = objective(predictions, inputs, shares)
  # Losses of layers are this stage's for its own layers.
  for losses in (routing_losses, attention_losses):
    extra, more = losses(aux, shares)
    loss, metrics = loss + extra, metrics | more
  if 'recall' in metrics:  # a mean over layers; stages add up
    layers = _sparse_layers(aux) / shares.micro_batches
    metrics |= {
      'recall': metrics['recall'] * layers * shares.micro_batches,
      'sparse_layers': layers,
    }
  return (stream, loss), metrics


def read(
  stage: Stage, variables: dict, stream: jax.Array | None, batch: dict
) -> Any:
  """Computes a stage of a held-out batch.

  Args:
    stage: whose.
    variables: in the compute dtype.
    stream: [B T ...] of the stage before; None for the first.
    batch: of a data.Heldout, without the documents' numbers.

  Returns:
    The stream; of the last stage `evaluate.negative_log_likelihood`.
  """
  module = stage.functional.merge(variables)
  ctx = context(
    batch['tokens'][:, :-1],
    batch['segments'][:, :-1],
    stage.config.vocab_size,
    positions=batch['positions'][:, :-1],
  )
  stream, _ = _through(stage, module, stream, ctx)
  if not stage.last:
    return stream
  hidden, _ = module.leave(stream, ctx, mtp=False)
  return negative_log_likelihood(hidden, module.head_weight(), batch)


def _computing(stage: Stage) -> contextlib.AbstractContextManager:
  """Makes operations inside take the kernels that a stage's model asks for."""
  compute = stage.config.compute
  return kernels.using(compute.kernels, compute.products)


def _through(
  stage: Stage, module: nnx.Module, stream: jax.Array | None, ctx: Context
) -> tuple[jax.Array, list]:
  """Returns the stream [B T ...] past a stage's layers, and statistics."""
  with _computing(stage):
    stream = module.enter(ctx) if stage.first else stream
    stream, _, statistics = module.through(stream, ctx, None)
  return stream, statistics


def _sparse_layers(aux: dict) -> int:
  """Counts the layers with sparse attention, whose recall is a metric."""
  blocks = [s for patterns in aux['segments'] for s in patterns]
  seen = [s['attention'] for s in [*blocks, *aux.get('mtp', [])]]
  return sum(s['recall'].size for s in seen if 'recall' in s)
