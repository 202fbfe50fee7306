"""Collects the losses that layers add by themselves, and their statistics.

Balance losses (DeepSeek-V2 section 2.2.3, V3 section 2.1.2) and the losses of
sparse attention's indexers (V3.2 section 2.1), whatever the objective is.
Legend: L MoE layers, E experts.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model.experts import statistics as routing_statistics
from deepseek_jax.model.stacks import moe_statistics
from deepseek_jax.record.metric import Metric
from deepseek_jax.train.objective import Shares

METRICS = {
  'balance_loss': Metric('Balance loss'),
  'attention_loss': Metric('Indexer loss', 'nats per query'),
  'recall': Metric('Recall of the indexer', 'share of attention'),
  'load': Metric('Load', 'choices', per='layer', over='sum'),
  'dropped': Metric('Dropped', 'choices', per='layer', over='sum'),
  **routing_statistics.METRICS,
}


def routing_losses(aux: dict, shares: Shares) -> tuple[jax.Array, dict]:
  """Returns the balance losses of an Output's aux, and its routing.

  Returns:
    The loss, and the metrics 'balance_loss', 'loads', 'load', 'dropped' and
    those of `routing_statistics`, as far as there are experts.
  """
  # Loads move the router biases; shares add up over micro-batches.
  metrics, loss = {'loads': _loads(aux)}, jnp.float32(0)
  balance = _balance_loss(aux)
  if balance is not None:
    metrics['balance_loss'] = balance / _rows(shares)
    loss += metrics['balance_loss']
  for name in ('load', 'dropped', *routing_statistics.METRICS):
    values = moe_statistics(aux, name)
    if values is not None:
      metrics[name] = values
  return loss, metrics


def attention_losses(aux: dict, shares: Shares) -> tuple[jax.Array, dict]:
  """Returns what sparse attentions learn from, and how well they choose.

  Returns:
    The sum of the layers' losses, and the metrics 'attention_loss' and
    'recall' (the layers' mean), as far as there are any.
  """
  layers = [stats['attention'] for stats in _every_block(aux).values()]
  every = lambda name: [s[name].reshape(-1) for s in layers if name in s]
  metrics, loss = {}, jnp.float32(0)
  if every('loss'):
    # A sum over layers, for each trains its own indexer.
    loss = jnp.concatenate(every('loss')).sum() / _rows(shares)
    metrics['attention_loss'] = loss
  if every('recall'):
    # A mean over layers: it is a share of the attention.
    recall = jnp.concatenate(every('recall')).mean()
    metrics['recall'] = recall / _rows(shares)
  return loss, metrics


def _rows(shares: Shares) -> jax.Array:
  """Returns the rows that count in the global batch, over a micro-batch's.

  Layers give means over rows, to which one of padding alone adds 0.
  """
  return shares.micro_batches * shares.filled


def _every_block(aux: dict) -> dict[tuple, dict]:
  """Returns each block's statistics by the place of its variables."""
  places = {
    ('segments', i, j): stats
    for i, patterns in enumerate(aux['segments'])
    for j, stats in enumerate(patterns)
  }
  places |= {
    ('mtp', k, 'block'): stats for k, stats in enumerate(aux.get('mtp', []))
  }
  return places


def _balance_loss(aux: dict) -> jax.Array | None:
  """Returns the sum of the layers' balance losses, None if no layer has one."""
  losses = [
    stats['ffn']['loss'].sum()
    for stats in _every_block(aux).values()
    if 'loss' in stats['ffn']
  ]
  return sum(losses) if losses else None


def _loads(aux: dict) -> dict[str, jax.Array]:
  """Returns the load [... E] of each router by the place of its block."""
  return {
    '/'.join(map(str, place)): stats['ffn']['load']
    for place, stats in _every_block(aux).items()
    if 'load' in stats['ffn']
  }
