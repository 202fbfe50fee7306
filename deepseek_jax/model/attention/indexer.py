"""The lightning indexer (DeepSeek-V3.2, arXiv:2512.02556, section 2.1).

A few light heads score every past token for every query,
I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), and attention reads the best. Keys
have a LayerNorm with a bias, and rope turns the *first* R channels: in halves
for DeepSeek's weights, although their attention interleaves; derived models
(GLM) interleave here too. YaRN's frequencies are those of the attention, its
softmax multiplier is not used. The released code turns q and k by a Hadamard
matrix for the sake of 8-bit numbers; products don't change, so it is left out.
Legend: B batch, T queries, S keys, K chosen keys, J index heads, I index dim,
R rope dim, D model, Q query latent.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.model.attention.query_blocks import Sight, over_blocks
from deepseek_jax.model.attention.rope import RopeConfig, rope
from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sequence import WHOLE, Along
from deepseek_jax.parallel.sharding import param


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
  """Shapes of the indexer; `interleaved` pairs rope channels (2i, 2i+1)."""

  heads: int = 64
  dim: int = 128
  interleaved: bool = False
  norm_eps: float = 1e-6

  def __post_init__(self):
    at_least(self, 'indexer.', heads=1, dim=1)
    above(self, 'indexer.', norm_eps=0)


class LayerNorm(nnx.Module):
  """(x - mean) / deviation * scale + bias over the last axis, in float32."""

  def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
    self.eps = eps
    ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
    self.scale = param(rngs, ones, (dim,), (None,), full_precision=True)
    self.bias = param(rngs, zeros, (dim,), (None,), full_precision=True)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class IndexQuery(NamedTuple):
  """What scores the keys."""

  q: jax.Array  # [B T J I]
  weight: jax.Array  # [B T J] float32, of any sign


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
    std,
    rngs: nnx.Rngs,
  ):
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

  def _turned(self, x, positions):
    first, rest = jnp.split(x, [self.rope_dim], axis=-1)
    first = rope(first, positions, self.rope)
    return jnp.concatenate([first, rest], axis=-1)

  def query(self, x, latent, positions) -> IndexQuery:
    """Of attention inputs x [B T D] and query latents [B T Q]."""
    q = jnp.einsum('BTQ,QJI->BTJI', latent, self.q[...])
    weight = x.astype(jnp.float32) @ self.weights[...]
    scale = (self.cfg.heads * self.cfg.dim) ** -0.5
    return IndexQuery(self._turned(q, positions), weight * scale)

  def key(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """What is cached of x [B T D]: [B T I]."""
    return self._turned(self.k_norm(x @ self.k[...]), positions)


def index_scores(
  query: IndexQuery, keys: jax.Array, along: Along = WHOLE
) -> jax.Array:
  """I of keys [B S I] -> [B T S], or of gathered ones [B T K I] -> [B T K].

  Where devices have some of the heads each, these are the sums of all.
  """
  form = 'BTJI,BSI->BTJS' if keys.ndim == 3 else 'BTJI,BTSI->BTJS'
  products = jnp.einsum(form, query.q, keys, preferred_element_type=jnp.float32)
  own = jnp.einsum('BTJS,BTJ->BTS', jax.nn.relu(products), query.weight)
  return along.sum_of_heads(own)


def best(scores: jax.Array, seen: jax.Array, k: int) -> jax.Array:
  """The k greatest visible scores' places; of equal ones the lowest place.

  Args:
    scores: [B T S] float32; seen: [B T S] bool.
    k: at most S.

  Returns:
    [B T k] int32, best first; -1 where fewer than k are visible.
  """
  B, T, S = scores.shape
  scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0 below 0
  flat = jnp.where(seen, scores, -jnp.inf).reshape(B * T, S)
  # lax.top_k puts the lower index first among equals: prefill and decoding
  # break ties alike, as a slot of the cache is a position.
  value, at = jax.lax.top_k(flat, k)
  return jnp.where(value > -jnp.inf, at, -1).reshape(B, T, k)


def choose(
  query: IndexQuery,
  keys: jax.Array,
  sight: Sight,
  k: int,
  *,
  key_segments: jax.Array | None = None,
  most: int = 128,
  along: Along = WHOLE,
) -> jax.Array:
  """The keys that each query attends to; no gradient.

  Args:
    query: of T tokens; keys: [B S I].
    sight: what the queries see.
    k: how many at most; at most S.
    key_segments: [B S], where the sight has segments.
    most: queries scored at a time.
    along: which heads these are.

  Returns:
    [B T k] int32, -1 where fewer than k are visible.
  """
  query, keys = jax.lax.stop_gradient((query, keys))
  S = keys.shape[1]

  def block(one, keys, key_segments):
    query, sight = one
    seen = sight.mask(jnp.arange(S), key_segments)
    return best(index_scores(query, keys, along), seen, k)

  numbers = S * query.q.shape[2]
  shared = keys, key_segments
  return over_blocks(block, (query, sight), most, numbers, shared)


def caught(shares: jax.Array, chosen: jax.Array) -> jax.Array:
  """How much of shares [B T S] lies at chosen [B T K] -> [B T]."""
  mass = jnp.take_along_axis(shares, jnp.maximum(chosen, 0), axis=-1)
  return jnp.where(chosen >= 0, mass, 0).sum(axis=-1)


def divergence(shares: jax.Array, logits: jax.Array, seen) -> jax.Array:
  """KL(shares || softmax(logits)) over the visible keys.

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
