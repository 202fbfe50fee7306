"""What teaches the lightning indexer, and how well it chooses (V3.2, 2.1.1).

Its softmax is to be the attention's, the heads' mean of it: over all keys
while attention is dense, over the chosen ones once it is sparse. Either way the
layer's softmax runs over nothing else, so each head counts alike. Inputs are
detached; gradients reach the indexer alone. Each device answers for the
queries and heads that it has; means are over all of them.
Legend: B batch, T queries, S keys, K chosen keys, H heads, C latent, N no-rope
dim, R rope dim, I index dim, Q sampled queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.attention import indexer as index
from deepseek_jax.model.attention import query_blocks
from deepseek_jax.model.attention.indexer import IndexQuery
from deepseek_jax.model.attention.query_blocks import Sight
from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sequence import Along


class Scene(NamedTuple):
  """Own queries and all keys of a fresh batch; only the indexer's are attached.

  Attributes:
    q: no-rope [B T H N] and turned rope part [B T H R].
    latents: [B S C] and turned rope keys [B S R].
    k_up: [C H N], what makes of a latent keys.
    index: the indexer's queries.
    keys: [B S I], its keys.
    sight: what the queries see.
    segments: [B S] of the keys, or None.
    scale: of the attention's scores.
    along: which part of sequences and heads this is.
  """

  q: tuple[jax.Array, jax.Array]
  latents: tuple[jax.Array, jax.Array]
  k_up: jax.Array
  index: IndexQuery
  keys: jax.Array
  sight: Sight
  segments: jax.Array | None
  scale: float
  along: Along

  def detached(self) -> 'Scene':
    attention = self.q, self.latents, self.k_up
    q, latents, k_up = jax.lax.stop_gradient(attention)
    return self._replace(q=q, latents=latents, k_up=k_up)

  def shares(self, scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention's scores [B T H S] float32 -> the heads' mean of it [B T S]."""
    scores = jnp.where(seen[:, :, None], scores * self.scale, MASKED)
    mean = jax.nn.softmax(scores, axis=-1).mean(axis=2)
    return self.along.mean_of_heads(mean)

  def mask(self, sight: Sight) -> jax.Array:
    """[B T S] bool."""
    return sight.mask(jnp.arange(self.keys.shape[1]), self.segments)

  def mean(self, values, segments, weights=None) -> jax.Array:
    """Of own queries' values [B T], over a sequence's that are no padding.

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
    total = (values * counted).sum(axis=1), counted.sum(axis=1)
    total, count = self.along.sum_of_parts(total)
    return total / jnp.maximum(count, 1)


def over_all(scene: Scene, k: int, most: int) -> dict[str, jax.Array]:
  """The warm-up's loss over all keys, and the recall of the `k` best.

  Args:
    scene: what is attended.
    k: how many the indexer would choose.
    most: queries at a time.

  Returns:
    'loss' and 'recall', each [B].
  """
  scene, (c, kr) = scene.detached(), scene.latents
  kn = jnp.einsum('BSC,CHN->BSHN', jax.lax.stop_gradient(c), scene.k_up)
  kr = jax.lax.stop_gradient(kr)
  f32 = {'preferred_element_type': jnp.float32}

  def block(one, kn, kr, keys, segments):
    (qn, qr), query, sight = one
    seen = sight.mask(jnp.arange(keys.shape[1]), segments)
    products = jnp.einsum('BTHN,BSHN->BTHS', qn, kn, **f32)
    products += jnp.einsum('BTHR,BSR->BTHS', qr, kr, **f32)
    shares = scene.shares(products, seen)
    scores = index.index_scores(query, keys, scene.along)
    chosen = index.best(jax.lax.stop_gradient(scores), seen, k)
    return index.divergence(shares, scores, seen), index.caught(shares, chosen)

  numbers = kn.shape[1] * max(kn.shape[2], scene.index.q.shape[2])
  queries = scene.q, scene.index, scene.sight
  shared = kn, kr, scene.keys, scene.segments
  loss, recall = query_blocks.over_blocks(block, queries, most, numbers, shared)
  mean = lambda values: scene.mean(values, scene.sight.segments)
  return {'loss': mean(loss), 'recall': mean(recall)}


def over_chosen(
  scene: Scene, chosen: jax.Array, shares: jax.Array, most: int
) -> dict[str, jax.Array]:
  """The loss over the chosen keys.

  Args:
    scene: what is attended.
    chosen: [B T K]; shares: [B T K], the attention's means over heads.
    most: queries at a time.

  Returns:
    'loss' [B].
  """

  def block(one, keys):
    query, at, shares = one
    own = query_blocks.rows(keys, at)
    scores = index.index_scores(query, own, scene.along)
    return index.divergence(shares, scores, at >= 0)

  numbers = chosen.shape[-1] * max(scene.index.q.shape[2:])
  loss = query_blocks.over_blocks(
    block, (scene.index, chosen, shares), most, numbers, (scene.keys,)
  )
  return {'loss': scene.mean(loss, scene.sight.segments)}


def sampled(
  length: int, count: int, ways: int
) -> tuple[np.ndarray, np.ndarray]:
  """`count` queries spread over a sequence, by the device that has them.

  Args:
    length: of a device's part; count: of all, at most.
    ways: how many parts.

  Returns:
    Own places [ways Q] and whether they count [ways Q]; devices that have
    fewer than others fill up with places that don't.
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


def recall(scene: Scene, chosen: jax.Array, count: int) -> jax.Array:
  """How much of dense attention's mass is chosen, of `count` queries: [B].

  So few queries take the latents as they are instead of expanding all keys.
  """
  scene, along = scene.detached(), scene.along
  at, counts = sampled(chosen.shape[1], count, along.ways)
  at, counts = jnp.asarray(at)[along.index], jnp.asarray(counts)[along.index]
  some = lambda a: jnp.asarray(a)[:, at]
  (qn, qr), sight, chosen = jax.tree.map(some, (scene.q, scene.sight, chosen))
  c, kr = scene.latents
  f32 = {'preferred_element_type': jnp.float32}
  qc = jnp.einsum('BTHN,CHN->BTHC', qn, scene.k_up)
  products = jnp.einsum('BTHC,BSC->BTHS', qc, c, **f32)
  products += jnp.einsum('BTHR,BSR->BTHS', qr, kr, **f32)
  shares = scene.shares(products, scene.mask(sight))
  return scene.mean(index.caught(shares, chosen), sight.segments, counts)
