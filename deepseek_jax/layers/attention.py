"""Softmax attention cores: causal within a batch, and over a cache.

Everything that differs between MHA, GQA and expanded MLA is in the shapes.
Legend: B batch, T queries, S keys, G key heads, J queries per key head,
K query/key dim, V value dim.
"""

import jax
import jax.numpy as jnp

_NEG = -1e30  # finite: a fully masked row gives a mean of values, never NaN


def _softmax_weighted(q, k, v, mask, scale):
  """q [B G J T K], k [B G S K], v [B G S V], mask [B|1 1 1 T S] -> like q."""
  scores = jnp.einsum(
    'BGJTK,BGSK->BGJTS', q, k, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask, scores * scale, _NEG)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BGJTS,BGSV->BGJTV', weights, v)


def _heads_first(q, k, v):
  B, T, H, K = q.shape
  G = k.shape[2]
  q = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
  return q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _tokens_first(y):
  B, G, J, T, V = y.shape
  return y.transpose(0, 3, 1, 2, 4).reshape(B, T, G * J, V)


def causal_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  segments: jax.Array | None = None,
  blocks: int = 8,
) -> jax.Array:
  """Attention of a batch to itself: a token sees its segment up to itself.

  Queries go in up to `blocks` unrolled blocks, each against just the keys
  before its end, so close to half of the square is never computed.

  Args:
    q: [B T H K]; k: [B T G K], G divides H; v: [B T G V].
    scale: multiplies the scores.
    segments: [B T] int32 document of each token, or None for one document.
    blocks: how many blocks of queries at most; each has at least 128.

  Returns:
    [B T H V] in v's dtype; the softmax is float32.
  """
  T = q.shape[1]
  size = max(128, -(-T // blocks))
  q, k, v = _heads_first(q, k, v)
  index = jnp.arange(T)
  out = []
  for start in range(0, T, size):
    end = min(start + size, T)
    mask = (index[start:end, None] >= index[:end])[None]
    if segments is not None:
      same = segments[:, start:end, None] == segments[:, None, :end]
      mask = mask & same
    out.append(
      _softmax_weighted(
        q[..., start:end, :],
        k[..., :end, :],
        v[..., :end, :],
        mask[:, None, None],
        scale,
      )
    )
  return _tokens_first(jnp.concatenate(out, axis=3))


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Attention to a cache whose slot s holds the token of position s.

  Args:
    q: [B T H K]; k: [B S G K]; v: [B S G V].
    positions: [B T] int32 of the queries; slots up to it are visible.
    scale: multiplies the scores.

  Returns:
    [B T H V] in v's dtype.
  """
  mask = positions[..., None] >= jnp.arange(k.shape[1])  # [B T S]
  q, k, v = _heads_first(q, k, v)
  return _tokens_first(_softmax_weighted(q, k, v, mask[:, None, None], scale))
