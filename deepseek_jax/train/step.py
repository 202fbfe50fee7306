"""The training step: one pure function from (state, batch) to (state, metrics).

Loss = next-token cross entropy + MTP loss (arXiv:2412.19437 section 2.2) +
balance losses, each averaged over the global batch, so micro-batches and
devices change no number beyond rounding.
Legend: B sequences, T tokens of a sequence, L MoE layers, E experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.model.experts import statistics as routing_statistics
from deepseek_jax.model.transformer import Model, moe_statistics
from deepseek_jax.parallel import per_device as local
from deepseek_jax.train.config import TrainConfig, optimizer_of, part_of
from deepseek_jax.train.cross_entropy import linear_cross_entropy
from deepseek_jax.train.gate import GateState, initial_gate
from deepseek_jax.train.gradient_norms import block_norms
from deepseek_jax.train.update import (
  Held,
  judged,
  move_biases,
  moving,
  proposed,
  tokens_seen,
  updated,
)

__all__ = [
  'Shares',
  'TrainConfig',
  'TrainState',
  'attention_losses',
  'initial_state',
  'loss_and_metrics',
  'move_biases',
  'routing_losses',
  'targets',
  'token_losses',
  'train_step',
]


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
  optimizer = optimizer_of(cfg, model.abstract['params'])
  return TrainState(
    jnp.int32(0),
    jnp.uint32(0),
    variables['params'],
    variables['buffers'],
    optimizer.init(variables['params']),
    initial_gate(),
  )


def targets(batch, cross_document: bool, padding: bool = True):
  """Returns a batch as the model reads it, and what it should predict.

  A token is predicted from the one before it unless either is padding, or
  they are of two documents that don't see each other.

  Args:
    batch: as in `loss_and_metrics`.
    cross_document, padding: as in `train_step`.

  Returns:
    tokens; segments, None where all are one document; positions, None for the
    default ones; labels; weights float32: each [B T].
  """
  tokens, segments = batch['tokens'], batch['segments']
  if cross_document and not padding:
    weights = jnp.ones(tokens[:, 1:].shape, jnp.float32)
    return tokens[:, :-1], None, None, tokens[:, 1:], weights
  real = segments > 0
  inside = real[:, 1:] & real[:, :-1]
  segments, positions = segments[:, :-1], None
  if cross_document:
    segments = real[:, :-1].astype(jnp.int32)
  else:
    inside = inside & (batch['segments'][:, 1:] == segments)
    positions = batch['positions'][:, :-1]
  weights = inside.astype(jnp.float32)
  return tokens[:, :-1], segments, positions, tokens[:, 1:], weights


def _cross_entropy(hidden, head, labels, weights):
  """The weighted sum over tokens: [B T D], [D V], [B T], [B T] -> scalar."""
  one = lambda hidden, labels, weights, head: linear_cross_entropy(
    hidden, head, labels, weights
  )
  return local.token_sum(one, (hidden, labels, weights), head)


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
    total += _cross_entropy(hidden, head, shifted, alive)
  return total / max(len(states), 1)


class Shares(NamedTuple):
  """How a micro-batch's loss counts in that of its global batch."""

  denominator: jax.Array  # tokens predicted in the global batch
  micro_batches: int  # in the global batch; all of one size
  mtp_weight: jax.Array  # lambda


def loss_and_metrics(
  model: Model,
  variables,
  batch,
  shares: Shares,
  *,
  cross_document: bool,
  padding: bool = True,
):
  """This micro-batch's share of the loss of its global batch.

  Args:
    model: whose loss.
    variables: its parameters and buffers.
    batch: 'tokens', 'segments', 'positions', each [B T+1] int32, and maybe
      'ngrams' [B T+1 L K] int32, see model.apply.
    shares: how it counts. V3 divides the MTP loss by all tokens, too.
    cross_document, padding: as in `train_step`.

  Returns:
    The loss, and metrics that add up over micro-batches: 'loss' (cross
    entropy), 'mtp_loss', 'balance_loss', 'load' [L E], 'dropped' [L] and
    'loads', by the block's place (MTP's too).
  """
  tokens, segments, positions, labels, weights = targets(
    batch, cross_document, padding
  )
  mtp = model.config.mtp.depth > 0
  ngrams = batch.get('ngrams')
  out = model.apply(
    variables,
    tokens,
    positions=positions,
    segment_ids=segments,
    train=True,
    mtp=mtp,
    ngrams=None if ngrams is None else ngrams[:, :-1],
  )
  loss, metrics = token_losses(
    out.hidden, out.aux, model.head(variables), (labels, weights), shares
  )
  extra, more = routing_losses(out.aux, shares)
  own, recall = attention_losses(out.aux, shares)
  return loss + extra + own, metrics | more | recall


def token_losses(hidden, aux: dict, head, wanted, shares: Shares):
  """Cross entropies of the next token and, if predicted, of those after it.

  Args:
    hidden: [B T D].
    aux: of an Output; its 'mtp_hidden' is read.
    head: [D V].
    wanted: labels and weights [B T].
    shares: how they count.

  Returns:
    The loss, and the metrics 'loss' and 'mtp_loss'.
  """
  labels, weights = wanted
  main = _cross_entropy(hidden, head, labels, weights)
  metrics = {'loss': main / shares.denominator}
  loss = metrics['loss']
  if 'mtp_hidden' in aux:
    extra = _mtp_loss(aux['mtp_hidden'], head, labels, weights)
    metrics['mtp_loss'] = extra / shares.denominator
    loss += shares.mtp_weight * metrics['mtp_loss']
  return loss, metrics


def routing_losses(aux: dict, shares: Shares):
  """The balance losses of an Output's aux, and what its experts saw.

  Returns:
    The loss, and the metrics 'balance_loss', 'loads', 'load', 'dropped' and
    those of `routing_statistics`, as far as there are experts.
  """
  metrics, loss = {'loads': _loads(aux)}, jnp.float32(0)
  balance = _balance_loss(aux)
  if balance is not None:
    metrics['balance_loss'] = balance / shares.micro_batches
    loss += metrics['balance_loss']
  for name in ('load', 'dropped', *routing_statistics.NAMES):
    values = moe_statistics(aux, name)
    if values is not None:
      metrics[name] = values
  return loss, metrics


def attention_losses(aux: dict, shares: Shares):
  """What sparse attentions learn from, and how well they choose.

  Returns:
    The sum of the layers' losses, and the metrics 'attention_loss' and
    'recall' (the layers' mean), as far as there are any.
  """
  layers = [stats['attention'] for stats in _every_block(aux).values()]
  every = lambda name: [s[name].reshape(-1) for s in layers if name in s]
  metrics, loss = {}, jnp.float32(0)
  if every('loss'):
    loss = jnp.concatenate(every('loss')).sum() / shares.micro_batches
    metrics['attention_loss'] = loss
  if every('recall'):
    recall = jnp.concatenate(every('recall')).mean()
    metrics['recall'] = recall / shares.micro_batches
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


def train_step(
  model: Model,
  cfg: TrainConfig,
  *,
  cross_document: bool = True,
  padding: bool = True,
):
  """Makes the step: (TrainState, batch) -> (TrainState, metrics).

  With `cross_document` the documents of a window see each other (V3's
  pre-training); else segments and positions of the batch keep them apart.
  Segment 0 is padding: neither predicted nor attended to, nor counted in
  loads, balance losses and routing statistics; it separates what lies on its
  two sides. padding=False is for batches that have none: with cross_document
  segments are not read then, which spares the masks.

  batch: 'tokens', 'segments', 'positions', each [B T+1] int32, B divisible by
  cfg.batch.accumulate. metrics: scalars 'loss', 'mtp_loss', 'balance_loss',
  'grad_norm', 'update_norm' (at a learning rate of 1), 'learning_rate',
  'applied', 'skipped', 'streak', of sparse attention 'attention_loss' and
  'recall', and per MoE layer 'load' [L E]
  (choices in the global batch), 'dropped' [L] and `routing_statistics` [L ...];
  'block_norms' of the gradient, by block.
  Jit it with the state donated.
  """
  optimizer = optimizer_of(cfg, model.abstract['params'])
  part = part_of(cfg, model.abstract['params'])

  def gradients(state, batch, mtp_weight):
    weights = targets(batch, cross_document, padding)[-1]
    shares = Shares(
      jnp.maximum(weights.sum(), 1.0), cfg.batch.accumulate, mtp_weight
    )

    def loss(params, micro):
      if part is not None:
        params = part.detached(params)
      variables = {'params': params, 'buffers': state.buffers}
      return loss_and_metrics(
        model,
        variables,
        micro,
        shares,
        cross_document=cross_document,
        padding=padding,
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
    tokens = tokens_seen(state, length)
    mtp_weight = cfg.mtp_weight.at(tokens, cfg.tokens)
    grads, metrics = gradients(state, batch, mtp_weight)
    norm = optax.tree.norm(grads)
    held = Held(state.params, state.buffers, state.moments)
    proposal = proposed(optimizer, held, grads, norm)
    verdict, gate, told = judged(
      cfg, state, metrics['loss'], norm, jnp.sqrt(proposal.square), length
    )
    loads = moving(metrics.pop('loads'), cfg.trainable)
    held = updated(held, proposal, loads, verdict)
    metrics |= told | {'block_norms': block_norms(grads)}
    sequences = state.sequences + jnp.uint32(batch['tokens'].shape[0])
    return TrainState(state.step + 1, sequences, *held, gate), metrics

  return step
