"""What one stage of a pipeline computes, in training and in evaluation.

Legend: B sequences, T tokens.
"""

import jax.numpy as jnp

from deepseek_jax.model import kernels
from deepseek_jax.model.context import Context, context
from deepseek_jax.pipeline.stages import Stage
from deepseek_jax.train.evaluate import negative_log_likelihood
from deepseek_jax.train.layer_losses import attention_losses, routing_losses
from deepseek_jax.train.objective import Objective, Predictions, Shares


def trained(
  stage: Stage,
  variables,
  stream,
  batch,
  shares: Shares,
  objective: Objective,
):
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
  ctx = context(
    inputs.tokens,
    inputs.segments,
    stage.config.vocab_size,
    positions=inputs.positions,
    train=True,
  )
  stream, statistics = _through(stage, module, stream, ctx)
  aux, loss, metrics = {'segments': statistics}, jnp.float32(0), {}
  if stage.last:
    with kernels.using(stage.config.compute.kernels):
      hidden, ahead = module.leave(stream, ctx, mtp=objective.mtp)
    aux, stream = aux | ahead, None
    predictions = Predictions(hidden, module.head_weight(), aux)
    loss, metrics = objective(predictions, inputs, shares)
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


def read(stage: Stage, variables, stream, batch):
  """A stage's part of a held-out batch.

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


def _through(stage: Stage, module, stream, ctx: Context):
  with kernels.using(stage.config.compute.kernels):
    stream = module.enter(ctx) if stage.first else stream
    stream, _, statistics = module.through(stream, ctx, None)
  return stream, statistics


def _sparse_layers(aux: dict) -> int:
  blocks = [s for patterns in aux['segments'] for s in patterns]
  seen = [s['attention'] for s in [*blocks, *aux.get('mtp', [])]]
  return sum(s['recall'].size for s in seen if 'recall' in s)
