"""Defines the training step, one pure function of state and batch.

It returns the next state and metrics. The loss is the objective's plus the
layers' own (balance, indexers), each averaged over the global batch, so
micro-batches and devices change no number beyond rounding.
Legend: B sequences, T tokens of a sequence, L MoE layers, E experts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError, check_type
from deepseek_jax.model.transformer import Model
from deepseek_jax.record.metric import Metric
from deepseek_jax.train import layer_losses
from deepseek_jax.train.config import (
  TrainConfig,
  judging,
  optimizer_of,
  part_of,
  recipe_of,
)
from deepseek_jax.train.gate import GateState, initial_gate
from deepseek_jax.train.gradient_norms import block_norms, tree_norm
from deepseek_jax.train.objective import (
  Objective,
  ObjectiveConfig,
  Predictions,
  PretrainingConfig,
  Shares,
  filled_rows,
  shares_of,
)
from deepseek_jax.train.update import (
  METRICS,
  Held,
  judged,
  moments_after,
  moving,
  proposed,
  tokens_seen,
  updated,
)


class TrainState(NamedTuple):
  """Holds all that a step changes, as arrays: float32 apart from counts."""

  step: jax.Array  # int32, steps taken, skipped ones too
  sequences: jax.Array  # uint32, sequences seen: 2^32 of 4096 exceed 14.8T
  params: Any
  buffers: Any
  moments: Any
  gate: GateState


def initial_state(
  model: Model, cfg: TrainConfig, variables: Mapping[str, Any]
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: the model.
    cfg: the recipe.
    variables: as model.init returns them.
  """
  cfg = recipe_of(cfg, model.config)
  optimizer = optimizer_of(cfg, model.abstract['params'])
  return TrainState(
    jnp.int32(0),
    jnp.uint32(0),
    variables['params'],
    variables['buffers'],
    optimizer.init(variables['params']),
    initial_gate(),
  )


def metrics_of(objective: Objective) -> dict[str, Metric]:
  """Returns what a step with this objective may return, described by name.

  Raises:
    InputError: a metric of the objective has the name of another, which would
      take its place.
  """
  taken = set(objective.metrics) & (
    layer_losses.METRICS.keys() | METRICS.keys()
  )
  if taken:
    raise InputError(
      f'objective: its metric {min(taken)!r} has the name of one that every'
      ' step returns; give it another'
    )
  blocks = {
    'block_norms': Metric('Gradient norms', per='block'),
    'update_norms': Metric('Update norms', per='block'),
  }
  return {
    'loss': Metric('Loss'),
    **objective.metrics,
    **layer_losses.METRICS,
    **METRICS,
    **blocks,
  }


def loss_and_metrics(
  model: Model,
  variables: Mapping,
  batch: Mapping[str, jax.Array],
  shares: Shares,
  objective: Objective,
) -> tuple[jax.Array, dict]:
  """Returns this micro-batch's share of the loss of its global batch.

  Args:
    model: whose loss.
    variables: its parameters and buffers.
    batch: what the objective reads, and maybe 'ngrams' [B T+1 L K] int32, see
      model.apply.
    shares: how it counts.
    objective: what is optimised.

  Returns:
    The loss, and metrics that add up over micro-batches: the objective's,
    'balance_loss', 'load' [L E], 'dropped' [L] and 'loads', by the block's
    place (MTP's too).
  """
  inputs = objective.inputs(batch)
  ngrams = batch.get('ngrams')
  out = model.apply(
    variables,
    inputs.tokens,
    positions=inputs.positions,
    segment_ids=inputs.segments,
    train=True,
    mtp=objective.mtp if model.config.mtp.depth else False,
    ngrams=None if ngrams is None else ngrams[:, :-1],
    routes=inputs.routes,
  )
  if shares.filled is None:
    shares = shares._replace(filled=filled_rows(inputs))
  # The objective's loss, then what the layers add by themselves.
  predictions = Predictions(out.hidden, model.head(variables), out.aux)
  loss, metrics = objective(predictions, inputs, shares)
  extra, more = layer_losses.routing_losses(out.aux, shares)
  own, recall = layer_losses.attention_losses(out.aux, shares)
  return loss + extra + own, metrics | more | recall


def train_step(
  model: Model,
  cfg: TrainConfig,
  objective: ObjectiveConfig = PretrainingConfig(),  # noqa: B008
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """Returns the step: (TrainState, batch) -> (TrainState, metrics).

  batch: arrays [B ...], B divisible by cfg.batch.accumulate; 'tokens' [B T+1]
  int32 and what else the objective reads (see `objective.next_token`: segment
  0 is padding, neither predicted nor attended to, nor counted in loads, balance
  losses and routing statistics). metrics: those of `metrics_of`, as far as the
  model has them: scalars, per MoE layer 'load' [L E] (choices in the global
  batch), 'dropped' [L] and the routing statistics [L ...]; 'block_norms' of the
  gradient and 'update_norms', by block. Jit it with the state donated.
  """
  check_type('model', model, Model, 'ds.build(config) makes one')
  check_type('cfg', cfg, TrainConfig, 'as in ds.recipes.v3_tiny().train')
  cfg = recipe_of(cfg, model.config)
  built = objective.build(model)
  cfg = judging(cfg, built.comparable)
  optimizer = optimizer_of(cfg, model.abstract['params'], built.frozen)
  part = part_of(cfg, model.abstract['params'])

  def gradients(
    state: TrainState, batch: dict, mtp_weight: jax.Array
  ) -> tuple[Any, dict]:
    # Of the whole batch, so that micro-batches add up to its loss.
    inputs = built.inputs(batch)
    shares = shares_of(inputs, cfg.batch.accumulate, mtp_weight)
    whole = {name: batch[name] for name in built.shared if name in batch}
    rows = {name: a for name, a in batch.items() if name not in whole}

    def loss(params: Any, micro: dict) -> tuple[jax.Array, dict]:
      if part is not None:
        # No gradient of a frozen parameter is computed.
        params = part.detached(params)
      variables = {'params': params, 'buffers': state.buffers}
      return loss_and_metrics(model, variables, micro | whole, shares, built)

    grad = jax.grad(loss, has_aux=True)
    if cfg.batch.accumulate == 1:
      return grad(state.params, rows)

    def one(total: tuple, micro: dict) -> tuple[tuple, None]:
      return jax.tree.map(jnp.add, total, grad(state.params, micro)), None

    # [B ...] -> [A B/A ...], A micro-batches; gradients and metrics add up.
    split = lambda a: a.reshape(cfg.batch.accumulate, -1, *a.shape[1:])
    micros = jax.tree.map(split, rows)
    shape = jax.eval_shape(
      grad, state.params, jax.tree.map(lambda a: a[0], micros)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.scan(one, zeros, micros)[0]

  def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    length = batch['tokens'].shape[1] - 1
    tokens = tokens_seen(state, length)
    # Schedules count the tokens before this step.
    mtp_weight = cfg.mtp_weight.at(tokens, cfg.tokens)
    grads, metrics = gradients(state, batch, mtp_weight)
    norms = block_norms(grads)
    norm = tree_norm(norms)
    # Propose an update, judge the step by it, then take it or leave it.
    held = Held(state.params, state.buffers, state.moments)
    proposal = proposed(optimizer, held, grads, norm)
    verdict, gate, told = judged(
      cfg, state, metrics['loss'], norm, proposal.norm, length
    )
    # The router biases move by the loads, not by a gradient (V3 section 2.1.2).
    loads = moving(metrics.pop('loads'), cfg.trainable)
    loads = loads if built.moves_biases else {}
    moments = moments_after(verdict, optimizer, held, grads, norm)
    held = updated(held, proposal._replace(moments=moments), loads, verdict)
    norms = {'block_norms': norms, 'update_norms': proposal.norms}
    metrics |= told | norms
    sequences = state.sequences + jnp.uint32(batch['tokens'].shape[0])
    return TrainState(state.step + 1, sequences, *held, gate), metrics

  return step
