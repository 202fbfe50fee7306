"""The training step: one pure function from (state, batch) to (state, metrics).

Loss = next-token cross entropy + MTP loss (arXiv:2412.19437 section 2.2) +
balance losses, each averaged over the global batch, so micro-batches and
devices change no number beyond rounding.
Legend: B sequences, T tokens of a sequence, L MoE layers, E experts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax import schedules
from deepseek_jax.gate import GateConfig, GateState, initial_gate, judge
from deepseek_jax.layers.balance import updated_bias
from deepseek_jax.losses import linear_cross_entropy
from deepseek_jax.optim import OptimizerConfig, adamw
from deepseek_jax.transformer import Model, moe_statistics


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The recipe of a run, but for its data.

  Attributes:
    tokens: length of the run.
    batch: sequences per step.
    optimizer, schedule, gate: see there.
    mtp_weight: lambda of the MTP loss.
    bias_rate: step of the router bias (gamma), frozen by its schedule.
  """

  tokens: float
  batch: schedules.BatchConfig
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: schedules.ScheduleConfig = schedules.ScheduleConfig()
  gate: GateConfig = GateConfig()
  mtp_weight: schedules.SwitchConfig = schedules.v3_mtp_weight()
  bias_rate: schedules.SwitchConfig = schedules.v3_bias_rate()


class TrainState(NamedTuple):
  """All that a step changes. Everything is an array; float32 but for counts."""

  step: jax.Array  # int32, steps taken, skipped ones too
  sequences: jax.Array  # uint32, sequences seen: 2^32 of 4096 exceed 14.8T
  params: Any
  buffers: Any
  moments: Any
  gate: GateState


def initial_state(model: Model, cfg: TrainConfig, variables) -> TrainState:
  """The state before the first step; `variables` as model.init makes them."""
  optimizer = adamw(cfg.optimizer, model.abstract['params'])
  return TrainState(
    jnp.int32(0),
    jnp.uint32(0),
    variables['params'],
    variables['buffers'],
    optimizer.init(variables['params']),
    initial_gate(),
  )


def _targets(batch, cross_document: bool):
  """tokens [B T+1] ... -> what the model reads, labels and weights [B T]."""
  tokens, segments = batch['tokens'], batch['segments']
  weights = jnp.ones(tokens[:, 1:].shape, jnp.float32)
  if cross_document:
    return tokens[:, :-1], None, None, tokens[:, 1:], weights
  inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  return (
    tokens[:, :-1],
    segments[:, :-1],
    batch['positions'][:, :-1],
    tokens[:, 1:],
    inside.astype(jnp.float32),
  )


def _mtp_loss(states, head, labels, weights):
  """Sum of the MTP cross entropies, averaged over depths.

  Depth k at i predicts label i+k, where that lies in i's document.
  """
  total = jnp.float32(0)
  T = labels.shape[1]
  alive = weights
  for depth, hidden in enumerate(states, start=1):
    shifted = jnp.roll(labels, -depth, axis=1)
    inside = jnp.arange(T) < T - depth
    alive = alive * jnp.roll(weights, -depth, axis=1) * inside
    flat = hidden.reshape(-1, hidden.shape[-1])
    total += linear_cross_entropy(
      flat, head, shifted.reshape(-1), alive.reshape(-1)
    )
  return total / max(len(states), 1)


class Shares(NamedTuple):
  """How a micro-batch's loss counts in that of its global batch."""

  denominator: jax.Array  # tokens predicted in the global batch
  micro_batches: int  # in the global batch; all of one size
  mtp_weight: jax.Array  # lambda


def loss_and_metrics(
  model: Model, variables, batch, shares: Shares, *, cross_document: bool
):
  """This micro-batch's share of the loss of its global batch.

  Args:
    model: whose loss.
    variables: its parameters and buffers.
    batch: 'tokens', 'segments', 'positions', each [B T+1] int32.
    shares: how it counts. V3 divides the MTP loss by all tokens, too.
    cross_document: documents see each other.

  Returns:
    The loss, and metrics that add up over micro-batches: 'loss' (cross
    entropy), 'mtp_loss', 'balance_loss', 'load' [L E], 'dropped' [L] and
    'loads', by the block's place (MTP's too).
  """
  tokens, segments, positions, labels, weights = _targets(batch, cross_document)
  mtp = model.config.mtp.depth > 0
  out = model.apply(
    variables,
    tokens,
    positions=positions,
    segment_ids=segments,
    train=True,
    mtp=mtp,
  )
  head = model.head(variables)
  flat = out.hidden.reshape(-1, out.hidden.shape[-1])
  main = linear_cross_entropy(
    flat, head, labels.reshape(-1), weights.reshape(-1)
  )
  metrics = {'loss': main / shares.denominator}
  loss = metrics['loss']
  if mtp:
    extra = _mtp_loss(out.aux['mtp_hidden'], head, labels, weights)
    metrics['mtp_loss'] = extra / shares.denominator
    loss += shares.mtp_weight * metrics['mtp_loss']
  balance = _balance_loss(out.aux)
  if balance is not None:
    metrics['balance_loss'] = balance / shares.micro_batches
    loss += metrics['balance_loss']
  metrics['loads'] = _loads(out.aux)
  load = moe_statistics(out.aux, 'load')
  if load is not None:
    metrics['load'] = load
    metrics['dropped'] = moe_statistics(out.aux, 'dropped')
  return loss, metrics


def _every_block(aux):
  """Each block's statistics in the places that its variables have."""
  places = {
    ('segments', i, j): stats
    for i, patterns in enumerate(aux['segments'])
    for j, stats in enumerate(patterns)
  }
  places |= {
    ('mtp', k, 'block'): stats for k, stats in enumerate(aux.get('mtp', []))
  }
  return places


def _balance_loss(aux):
  losses = [
    stats['ffn']['loss'].sum()
    for stats in _every_block(aux).values()
    if 'loss' in stats['ffn']
  ]
  return sum(losses) if losses else None


def _loads(aux):
  return {
    '/'.join(map(str, place)): stats['ffn']['load']
    for place, stats in _every_block(aux).items()
    if 'load' in stats['ffn']
  }


def move_biases(buffers, loads, rate):
  """Buffers with every router bias moved by its layer's load.

  Args:
    buffers: the model's buffers.
    loads: 'segments/i/j' or 'mtp/k/block' -> load [... E] of the global batch.
    rate: gamma.
  """
  moved = jax.tree.map(lambda b: b, buffers)  # a copy of the dicts
  for place, load in loads.items():
    node = moved
    for key in place.split('/'):
      node = node.get(int(key) if key.isdigit() else key, {})
    router = node.get('ffn', {}).get('router', {})
    if 'bias' in router:
      router['bias'] = updated_bias(router['bias'], load, rate)
  return moved


def train_step(model: Model, cfg: TrainConfig, *, cross_document: bool = True):
  """Makes the step: (TrainState, batch) -> (TrainState, metrics).

  With `cross_document` the documents of a window see each other (V3's
  pre-training); else segments and positions of the batch keep them apart.

  batch: 'tokens', 'segments', 'positions', each [B T+1] int32, B divisible by
  cfg.batch.accumulate. metrics: scalars 'loss', 'mtp_loss', 'balance_loss',
  'grad_norm', 'learning_rate', 'applied', 'skipped', 'streak', and per MoE
  layer 'load' [L E] (choices in the global batch) and 'dropped' [L].
  Jit it with the state donated.
  """
  optimizer = adamw(cfg.optimizer, model.abstract['params'])

  def gradients(state, batch, mtp_weight):
    weights = _targets(batch, cross_document)[-1]
    shares = Shares(
      jnp.maximum(weights.sum(), 1.0), cfg.batch.accumulate, mtp_weight
    )

    def loss(params, micro):
      variables = {'params': params, 'buffers': state.buffers}
      return loss_and_metrics(
        model, variables, micro, shares, cross_document=cross_document
      )

    grad = jax.grad(loss, has_aux=True)
    if cfg.batch.accumulate == 1:
      return grad(state.params, batch)

    def one(total, micro):
      return jax.tree.map(jnp.add, total, grad(state.params, micro)), None

    split = lambda a: a.reshape(cfg.batch.accumulate, -1, *a.shape[1:])
    micros = jax.tree.map(split, batch)
    shape = jax.eval_shape(
      grad, state.params, jax.tree.map(lambda a: a[0], micros)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.scan(one, zeros, micros)[0]

  def step(state: TrainState, batch):
    length = batch['tokens'].shape[1] - 1
    tokens = state.sequences.astype(jnp.float32) * length
    mtp_weight = cfg.mtp_weight.at(tokens, cfg.tokens)
    grads, metrics = gradients(state, batch, mtp_weight)
    norm = optax.tree.norm(grads)
    applied, gated = judge(cfg.gate, state.gate, metrics['loss'], norm)
    rate = schedules.learning_rate(cfg.schedule, state.step, tokens, cfg.tokens)
    updates, moments = optimizer.update(grads, state.moments, state.params)
    params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
    buffers = move_biases(
      state.buffers,
      metrics.pop('loads'),
      cfg.bias_rate.at(tokens, cfg.tokens),
    )
    keep = lambda new, old: jax.tree.map(
      lambda n, o: jnp.where(applied, n, o), new, old
    )
    metrics |= {
      'grad_norm': norm,
      'learning_rate': rate,
      'applied': applied,
      'skipped': gated.skipped,
      'streak': gated.streak,
    }
    new = TrainState(
      state.step + 1,
      state.sequences + jnp.uint32(batch['tokens'].shape[0]),
      keep(params, state.params),
      keep(buffers, state.buffers),
      keep(moments, state.moments),
      gated,
    )
    return new, metrics

  return step
