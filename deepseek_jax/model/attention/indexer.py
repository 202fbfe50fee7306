"""Computes the lightning indexer (DeepSeek-V3.2, section 2.1).

See arXiv:2512.02556. A few light heads score every past token for every query,
I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), and attention reads the best. Keys
have a LayerNorm with a bias, and rope rotates the *first* R channels: in halves
for DeepSeek's weights, although their attention interleaves; derived models
(GLM) interleave here too. YaRN's frequencies are those of the attention, its
softmax multiplier is not used. The released code multiplies q and k by a
Hadamard matrix for the sake of 8-bit numbers; products don't change, so it is
left out, but for a cache in float8 (index_codes).
Legend: B batch, T queries, S keys, K chosen keys, J index heads, I index dim,
R rope dim, D model, Q query latent.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model.attention import candidates, index_codes
from deepseek_jax.model.attention.index_codes import FP8Keys, Keys
from deepseek_jax.model.attention.query_blocks import (
  Visibility,
  over_blocks,
  rows,
)
from deepseek_jax.model.attention.rope import RopeConfig, rope
from deepseek_jax.parallel import products
from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sequence import WHOLE, Along
from deepseek_jax.parallel.sharding import param
from pallas_kernels.indexer import indexer
from pallas_kernels.mla_prefill import segment_starts

_LARGEST = 1 << 14  # tokens of a block
_FEW = 16  # queries that read all keys at once, as decoding does


@dataclasses.dataclass(frozen=True)
class IndexBlocksConfig:
  """Describes a search in two levels (HISA, arXiv:2603.28458).

  Attributes:
    size: tokens of a block, a power of two, so that pages hold whole ones.
    count: blocks whose tokens a query scores, the first of its document and
      its own among them.
  """

  size: int = 128
  count: int = 64

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'indexer.blocks.', size=1, count=2)
    if self.size & (self.size - 1) or self.size > _LARGEST:
      raise InputError(
        f'indexer.blocks.size = {self.size}: must be a power of two of at most'
        f' {_LARGEST:,}'
      )


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
  """Describes the indexer.

  Attributes:
    heads: J.
    dim: I.
    interleaved: pairs rope channels (2i, 2i+1).
    norm_eps: of the keys' norm.
    blocks: looks for the best keys in the best blocks alone; None: among all.
  """

  heads: int = 64
  dim: int = 128
  interleaved: bool = False
  norm_eps: float = 1e-6
  blocks: IndexBlocksConfig | None = None

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'indexer.', heads=1, dim=1)
    above(self, 'indexer.', norm_eps=0)


class LayerNorm(nnx.Module):
  """Computes (x - mean) / deviation * scale + bias over the last axis."""

  def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
    """Makes scale and bias [dim], float32."""
    self.eps = eps
    ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
    self.scale = param(rngs, ones, (dim,), (None,), full_precision=True)
    self.bias = param(rngs, zeros, (dim,), (None,), full_precision=True)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x [... dim] normalised in float32, in its dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class IndexQuery(NamedTuple):
  """Holds what scores the keys."""

  q: jax.Array  # [B T J I]
  weight: jax.Array  # [B T J] float32, of any sign
  scale: jax.Array | None = None  # [B T J] float32, of q in float8

  def encoded(self) -> 'IndexQuery':
    """Returns the query of keys in float8, in float8 as well."""
    codes, scale = index_codes.encoded(self.q)
    return IndexQuery(codes, self.weight, scale)

  def wide(self) -> 'IndexQuery':
    """Returns the same query with q of no format."""
    if self.scale is None:
      return self
    return IndexQuery(index_codes.decoded(self.q, self.scale), self.weight)


class Indexer(nnx.Module):
  """Makes the indexer's queries and keys."""

  def __init__(
    self,
    cfg: IndexerConfig,
    dim: int,
    latent: int,
    rope_dim: int,
    rope_cfg: RopeConfig,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    """Makes the projections of queries, keys and head weights.

    Args:
      cfg: see there.
      dim: D.
      latent: Q.
      rope_dim: R.
      rope_cfg: the attention's; which channels pair is up to `cfg`.
      std: of the weights.
      rngs: random streams of `params`.
    """
    self.cfg, self.rope_dim = cfg, rope_dim
    self.rope = dataclasses.replace(rope_cfg, interleaved=cfg.interleaved)
    J, I = cfg.heads, cfg.dim
    init = nnx.initializers.normal(std)
    self.q = param(rngs, init, (latent, J, I), (None, 'heads', None))
    self.k = param(rngs, init, (dim, I), ('embed', None))
    self.k_norm = LayerNorm(I, eps=cfg.norm_eps, rngs=rngs)
    self.weights = param(
      rngs, init, (dim, J), ('embed', None), full_precision=True
    )

  def _rotated(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates the first R channels of x [B T ... I]."""
    first, rest = jnp.split(x, [self.rope_dim], axis=-1)
    first = rope(first, positions, self.rope)
    return jnp.concatenate([first, rest], axis=-1)

  def query(
    self, x: jax.Array, latent: jax.Array, positions: jax.Array
  ) -> IndexQuery:
    """Returns queries of attention inputs x [B T D] and latents [B T Q]."""
    q = products.einsum('BTQ,QJI->BTJI', latent, self.q[...])  # [B T J I]
    weight = x.astype(jnp.float32) @ self.weights[...]
    # A constant for all keys: no choice depends on it, the loss does.
    scale = (self.cfg.heads * self.cfg.dim) ** -0.5
    return IndexQuery(self._rotated(q, positions), weight * scale)

  def key(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns what is cached of x [B T D]: [B T I]."""
    return self._rotated(
      self.k_norm(products.matmul(x, self.k[...])), positions
    )


def index_scores(
  query: IndexQuery, keys: Keys, along: Along = WHOLE
) -> jax.Array:
  """Computes I for keys [B S I]: [B T S]; for gathered ones [B T K I]: [B T K].

  Where devices hold some of the heads each, these are the sums of all. Of keys
  in float8 the query is, too.
  """
  q, weight = query.q, query.weight
  scales = None
  if isinstance(keys, FP8Keys):
    keys, scales = keys
    # Whatever rounds products of float32 has room for float8.
    q, keys = (a.astype(jnp.float32) for a in (q, keys))
    weight = weight * query.scale
  form = 'BTJI,BSI->BTJS' if keys.ndim == 3 else 'BTJI,BTSI->BTJS'
  dots = jnp.einsum(form, q, keys, preferred_element_type=jnp.float32)
  own = jnp.einsum('BTJS,BTJ->BTS', jax.nn.relu(dots), weight)
  if scales is not None:
    own *= scales[:, None]
  return along.sum_of_heads(own)


def best(scores: jax.Array, seen: jax.Array, k: int) -> jax.Array:
  """Returns the places of the k greatest visible scores, ascending.

  Of equal scores the lowest places are taken.

  Args:
    scores: [B T S] float32; seen: [B T S] bool.
    k: at most S.

  Returns:
    [B T k] int32, and -1 behind them where fewer than k are visible.
  """
  B, T, S = scores.shape
  scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0 below 0
  flat = jnp.where(seen, scores, -jnp.inf).reshape(B * T, S)

  # Both take the lower index among equals: prefill and decoding break ties
  # alike, as a slot of the cache is a position.
  at = jax.lax.platform_dependent(
    flat,
    cpu=lambda a: candidates.best(a, k),
    default=lambda a: candidates.by_heap(a, k),
  )
  return at.reshape(B, T, k)


def choose(
  query: IndexQuery,
  keys: Keys,
  visibility: Visibility,
  k: int,
  *,
  key_segments: jax.Array | None = None,
  most: int = 128,
  along: Along = WHOLE,
) -> jax.Array:
  """Chooses the keys that each query attends to; no gradient.

  Args:
    query: of T tokens; keys: [B S I], both or none in float8.
    visibility: what the queries may attend to.
    k: how many at most; at most S.
    key_segments: [B S], where the visibility has segments.
    most: queries scored at a time.
    along: which heads these are.

  Returns:
    [B T k] int32, -1 where fewer than k are visible.
  """
  query, keys = jax.lax.stop_gradient((query, keys))
  S = keys.shape[1]

  def block(
    one: tuple[IndexQuery, Visibility],
    keys: Keys,
    key_segments: jax.Array | None,
  ) -> jax.Array:
    query, visibility = one
    seen = visibility.mask(jnp.arange(S), key_segments)
    return best(index_scores(query, keys, along), seen, k)

  def on_cpu(
    one: tuple[IndexQuery, Visibility],
    keys: Keys,
    key_segments: jax.Array | None,
  ) -> jax.Array:
    query, visibility = one

    def score(places: jax.Array, some: tuple) -> jax.Array:
      scores = index_scores(query, some[0])
      seen = visibility.mask(places, some[1])
      return jnp.where(seen, jnp.where(scores == 0, 0.0, scores), -jnp.inf)

    more = -S % candidates.CHUNK  # places that no query sees
    longer = lambda a: jnp.pad(a, ((0, 0), (0, more), *[(0, 0)] * (a.ndim - 2)))
    return candidates.by_chunks(
      score,
      jax.tree.map(longer, (keys, key_segments)),
      query.q.shape[:2],
      visibility.places.max(),
      k,
    )

  def either(*args: Any) -> jax.Array:
    return jax.lax.platform_dependent(*args, cpu=on_cpu, default=block)

  # Scores of each head: what a block holds per query.
  numbers = S * query.q.shape[2]
  shared = keys, key_segments
  # Devices with other heads must score the same chunks together.
  chunks = query.q.shape[1] >= _FEW and S > candidates.CHUNK
  run = either if chunks and not along.heads else block
  return over_blocks(run, (query, visibility), most, numbers, shared)


def choose_within(
  impl: str,
  query: IndexQuery,
  keys: Keys,
  span: tuple[jax.Array, jax.Array],
  top_k: int,
  along: Along = WHOLE,
) -> jax.Array:
  """Chooses keys in a range of each query, by a kernel.

  Args:
    impl: 'reference' or 'gpu', of the kernel.
    query: of the local tokens and index heads.
    keys: [B S I] of all tokens, in float8 if the query is.
    span: first and end of the keys that a query may choose, [B T] each.
    top_k: how many a query chooses.
    along: the local shard; all index heads score together, so what devices
      with other heads hold is gathered.

  Returns:
    [B T top_k] int32, ascending, then -1.
  """
  q, weight, q_scale = of_all_heads(query, along)
  keys, k_scale = keys if isinstance(keys, FP8Keys) else (keys, None)
  return indexer(
    *(q, keys, weight, *span),
    top_k=top_k,
    q_scale=q_scale,
    k_scale=k_scale,
    impl=impl,
  )


def choose_by_kernel(
  impl: str,
  query: IndexQuery,
  keys: Keys,
  places: jax.Array,
  segments: jax.Array | None,
  *,
  top_k: int,
  along: Along = WHOLE,
) -> jax.Array:
  """Computes `choose` by a kernel.

  Args:
    impl, query, keys, top_k, along: as of `choose_within`.
    places: [B T] of the queries among the keys.
    segments: [B S] documents of the keys; None for one.
  """
  first = jnp.zeros_like(places)
  if segments is not None:
    first = jnp.take_along_axis(segment_starts(segments), places, axis=1)
  # A query attends to keys first..own place of its document.
  span = first, places + 1
  return choose_within(impl, query, keys, span, top_k, along)


def of_all_heads(query: IndexQuery, along: Along) -> IndexQuery:
  """Returns a query with the index heads of all devices that share it."""
  if not along.heads:
    return query
  whole = lambda a: jax.lax.all_gather(a, along.heads, axis=2, tiled=True)
  return jax.tree.map(whole, query)


def divergence_of_chosen(
  query: IndexQuery,
  keys: jax.Array,
  chosen: jax.Array,
  shares: jax.Array,
  *,
  most: int,
  along: Along = WHOLE,
) -> jax.Array:
  """Computes the `divergence` of each query over the keys chosen for it.

  Args:
    query: of T tokens; keys: [B S I].
    chosen: [B T K], -1 for none; shares: [B T K], as of `divergence`.
    most: queries at a time.
    along: which heads these are.

  Returns:
    [B T] float32, in nats.
  """

  def block(one: tuple, keys: jax.Array) -> jax.Array:
    query, at, shares = one
    # Each query's own index keys [B n K I].
    scores = index_scores(query, rows(keys, at), along)
    return divergence(shares, scores, at >= 0)

  numbers = chosen.shape[-1] * max(query.q.shape[2:])
  return over_blocks(block, (query, chosen, shares), most, numbers, (keys,))


def caught(shares: jax.Array, chosen: jax.Array) -> jax.Array:
  """Returns how much of shares [B T S] lies at chosen [B T K]: [B T]."""
  mass = jnp.take_along_axis(shares, jnp.maximum(chosen, 0), axis=-1)
  return jnp.where(chosen >= 0, mass, 0).sum(axis=-1)


def divergence(
  shares: jax.Array, logits: jax.Array, seen: jax.Array
) -> jax.Array:
  """Computes KL(shares || softmax(logits)) over the visible keys.

  Args:
    shares: [... K] float32, adding up to 1; no gradient.
    logits: [... K] float32.
    seen: [... K] bool; shares are 0 elsewhere.

  Returns:
    [...] float32, in nats.
  """
  shares = jax.lax.stop_gradient(shares)
  log_q = jax.nn.log_softmax(jnp.where(seen, logits, MASKED), axis=-1)
  entropy = jax.scipy.special.xlogy(shares, shares)
  return (entropy - shares * log_q).sum(axis=-1)
