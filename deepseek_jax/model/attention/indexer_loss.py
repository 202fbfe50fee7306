"""Computes the indexer's loss, and how well it chooses (V3.2, section 2.1.1).

Its softmax is to be the attention's, the heads' mean of it: over all keys
while attention is dense, over the chosen ones once it is sparse. Either way the
layer's softmax runs over nothing else, so each head counts alike. Inputs are
detached; gradients reach the indexer alone. Each device computes the queries
and heads that it holds; means are over all of them.
Legend: B batch, T queries, S keys, K chosen keys, H heads, C latent, N no-rope
dim, R rope dim, I index dim, Q sampled queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.attention import absorbing, query_blocks
from deepseek_jax.model.attention import indexer as index
from deepseek_jax.model.attention.indexer import IndexQuery
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.parallel import products
from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sequence import Along


class LossInputs(NamedTuple):
  """Holds the local queries and all keys of a fresh batch.

  Gradients reach those of the indexer alone.

  Attributes:
    q: no-rope [B T H N] and rotated rope part [B T H R].
    latents: [B S C] and rotated rope keys [B S R].
    k_up: [C H N], what makes of a latent keys.
    index: the indexer's queries.
    keys: [B S I], its keys.
    visibility: what the queries may attend to.
    segments: [B S] of the keys, or None.
    scale: of the attention's scores.
    along: the local shard of sequences and heads.
  """

  q: tuple[jax.Array, jax.Array]
  latents: tuple[jax.Array, jax.Array]
  k_up: jax.Array
  index: IndexQuery
  keys: jax.Array
  visibility: Visibility
  segments: jax.Array | None
  scale: float
  along: Along

  def detached(self) -> 'LossInputs':
    """Returns the same with the attention's inputs detached."""
    attention = self.q, self.latents, self.k_up
    q, latents, k_up = jax.lax.stop_gradient(attention)
    return self._replace(q=q, latents=latents, k_up=k_up)

  def shares(self, scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns the heads' mean attention [B T S] of scores [B T H S] float32."""
    scores = jnp.where(seen[:, :, None], scores * self.scale, MASKED)
    mean = jax.nn.softmax(scores, axis=-1).mean(axis=2)
    return self.along.mean_of_heads(mean)

  def mask(self, visibility: Visibility) -> jax.Array:
    """Returns which keys the queries may attend to, [B T S] bool."""
    return visibility.mask(jnp.arange(self.keys.shape[1]), self.segments)

  def mean(
    self,
    values: jax.Array,
    segments: jax.Array | None,
    weights: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the mean of the queries' values over a sequence, without padding.

    Args:
      values: [B T].
      segments: [B T] of the queries, or None.
      weights: [T], how often each counts; once by default.

    Returns:
      [B], of all devices' queries.
    """
    counted = jnp.ones(values.shape, jnp.float32)
    if weights is not None:
      counted *= weights
    if segments is not None:
      counted *= segments > 0
    # Sums go over devices before the division: shards hold unequal padding.
    total = (values * counted).sum(axis=1), counted.sum(axis=1)
    total, count = self.along.sum_of_parts(total)
    return total / jnp.maximum(count, 1)


def over_all(
  inputs: LossInputs, k: int, most: int, chosen: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Computes the warm-up's loss over all keys, and the recall of a choice.

  Args:
    inputs: the local queries and all keys.
    k: how many the indexer would choose.
    most: queries at a time.
    chosen: [B T k], what it would choose; by default the best of all.

  Returns:
    'loss' and 'recall', each [B].
  """
  inputs, (c, kr) = inputs.detached(), inputs.latents
  # Keys of all heads, made once for all blocks: [B S H N].
  kn = products.einsum('BSC,CHN->BSHN', jax.lax.stop_gradient(c), inputs.k_up)
  kr = jax.lax.stop_gradient(kr)
  f32 = {'preferred_element_type': jnp.float32}

  def block(
    one: tuple,
    kn: jax.Array,
    kr: jax.Array,
    keys: jax.Array,
    segments: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array]:
    (qn, qr), query, visibility, chosen = one
    seen = visibility.mask(jnp.arange(keys.shape[1]), segments)
    dots = jnp.einsum('BTHN,BSHN->BTHS', qn, kn, **f32)
    dots += jnp.einsum('BTHR,BSR->BTHS', qr, kr, **f32)
    # The target [B T S], then the indexer's own scores.
    shares = inputs.shares(dots, seen)
    scores = index.index_scores(query, keys, inputs.along)
    if chosen is None:
      chosen = index.best(jax.lax.stop_gradient(scores), seen, k)
    return index.divergence(shares, scores, seen), index.caught(shares, chosen)

  numbers = kn.shape[1] * max(kn.shape[2], inputs.index.q.shape[2])
  queries = inputs.q, inputs.index, inputs.visibility, chosen
  shared = kn, kr, inputs.keys, inputs.segments
  loss, recall = query_blocks.over_blocks(block, queries, most, numbers, shared)
  mean = lambda values: inputs.mean(values, inputs.visibility.segments)
  return {'loss': mean(loss), 'recall': mean(recall)}


def over_chosen(
  inputs: LossInputs, chosen: jax.Array, shares: jax.Array, most: int
) -> dict[str, jax.Array]:
  """Computes the loss over the chosen keys.

  Args:
    inputs: the local queries and all keys.
    chosen: [B T K]; shares: [B T K], the attention's means over heads.
    most: queries at a time.

  Returns:
    'loss' [B].
  """
  loss = index.divergence_of_chosen(
    inputs.index, inputs.keys, chosen, shares, most=most, along=inputs.along
  )
  return {'loss': inputs.mean(loss, inputs.visibility.segments)}


def sampled(
  length: int, count: int, ways: int
) -> tuple[np.ndarray, np.ndarray]:
  """Spreads `count` queries over a sequence, by the device that holds them.

  Args:
    length: of a device's shard; count: of all, at most.
    ways: how many shards.

  Returns:
    Local places [ways Q] int and whether they count [ways Q] float32; devices
    that have fewer than others fill up with places that don't.
  """
  every = length * ways
  # A single one is the last: the first has nothing to choose from.
  begin = 0 if count > 1 else every - 1
  places = np.linspace(begin, every - 1, min(count, every)).astype(int)
  device = places // length
  number = np.arange(len(places)) - np.searchsorted(device, device)
  at = np.zeros((ways, number.max() + 1), int)
  counts = np.zeros(at.shape, np.float32)
  at[device, number], counts[device, number] = places % length, 1
  return at, counts


def recall(inputs: LossInputs, chosen: jax.Array, count: int) -> jax.Array:
  """Measures how much of dense attention's mass is chosen, [B] float32.

  It is a mean over `count` queries: so few take the latents as they are instead
  of expanding all keys.
  """
  inputs, along = inputs.detached(), inputs.along
  at, counts = sampled(chosen.shape[1], count, along.ways)
  at, counts = jnp.asarray(at)[along.index], jnp.asarray(counts)[along.index]
  # From here on T is Q, the sampled queries of this device.
  some = lambda a: jnp.asarray(a)[:, at]
  (qn, qr), visibility, chosen = jax.tree.map(
    some, (inputs.q, inputs.visibility, chosen)
  )
  c, kr = inputs.latents
  f32 = {'preferred_element_type': jnp.float32}
  # Absorbed scores of all keys [B Q H S].
  qc = absorbing.into_queries(qn, inputs.k_up)
  dots = jnp.einsum('BTHC,BSC->BTHS', qc, c, **f32)
  dots += jnp.einsum('BTHR,BSR->BTHS', qr, kr, **f32)
  shares = inputs.shares(dots, inputs.mask(visibility))
  return inputs.mean(index.caught(shares, chosen), visibility.segments, counts)
