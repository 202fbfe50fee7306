"""Softmax attention cores: causal within a batch, and over a cache.

Everything that differs between MHA, GQA and expanded MLA is in the shapes.
Legend: B batch, T queries, S keys, H heads, G key heads, K query/key dim,
V value dim, N = B * H.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sharding import in_mesh


def _dot(a, b):
  """[M K] @ [K N], accumulated in float32."""
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _blocks(length, most):
  """Borders of at most `most` blocks of queries, each of at least 128."""
  size = max(128, -(-length // most))
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def _mask(segments, start, end):
  """[T of the block, S before its end] bool."""
  index = jnp.arange(end)
  mask = index[start:, None] >= index
  if segments is None:
    return mask
  return mask & (segments[start:end, None] == segments[:end])


def _over_heads(f, arrays):
  """f of each entry of the first axis, stacked.

  A CPU takes two heads at a time: their scores stay in its caches, which is
  three times as fast as one batched product (measured). Accelerators, and
  arrays sharded over a mesh, take all at once.
  """
  one_cpu = jax.default_backend() == 'cpu' and not in_mesh()
  if one_cpu:
    size = 2 - arrays[0].shape[0] % 2
    return jax.lax.map(lambda a: f(*a), arrays, batch_size=size)
  return jax.vmap(f)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _causal(q, k, v, segments, scale, most):
  """q k [N T K], v [N T V], segments [N T] or None -> [N T V]."""
  return _causal_fwd(q, k, v, segments, scale, most)[0]


def _causal_fwd(q, k, v, segments, scale, most):
  def head(q, k, v, segments):
    outs, normalizers = [], []
    for start, end in _blocks(q.shape[0], most):
      scores = _dot(q[start:end], k[:end].T) * scale
      scores = jnp.where(_mask(segments, start, end), scores, MASKED)
      top = scores.max(axis=-1, keepdims=True)
      p = jnp.exp(scores - top)
      total = p.sum(axis=-1, keepdims=True)
      outs.append(_dot(p.astype(v.dtype), v[:end]) / total)
      normalizers.append((top + jnp.log(total))[:, 0])
    out = jnp.concatenate(outs).astype(v.dtype)
    return out, jnp.concatenate(normalizers)

  out, normalizer = _over_heads(head, (q, k, v, segments))
  return out, (q, k, v, segments, out, normalizer)


def _causal_bwd(scale, most, saved, grad):
  """Scores are made again, keys first: then just one product is transposed."""
  f32 = jnp.float32

  def head(q, k, v, segments, out, normalizer, grad):
    delta = (grad.astype(f32) * out.astype(f32)).sum(axis=-1)  # [T]
    dk, dv = jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
    dq = []
    for start, end in _blocks(q.shape[0], most):
      q_block, g_block = q[start:end], grad[start:end]
      scores = _dot(k[:end], q_block.T) * scale  # [S T]
      p = jnp.exp(scores - normalizer[start:end])
      p = jnp.where(_mask(segments, start, end).T, p, 0.0)
      dv = dv.at[:end].add(_dot(p.astype(v.dtype), g_block))
      dp = _dot(v[:end], g_block.T)
      ds = (p * (dp - delta[start:end]) * scale).astype(q.dtype)
      dk = dk.at[:end].add(_dot(ds, q_block))
      dq.append(_dot(ds.T, k[:end]))
    dq = jnp.concatenate(dq).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)

  return *_over_heads(head, (*saved, grad)), None


_causal.defvjp(_causal_fwd, _causal_bwd)


def _heads_first(x, heads):
  """[B T G K] -> [B * heads, T, K], each of G repeated to make up heads."""
  B, T, G, K = x.shape
  x = jnp.repeat(x.transpose(0, 2, 1, 3), heads // G, axis=1)
  return x.reshape(B * heads, T, K)


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
  before its end, so close to half of the square is never computed; the
  backward pass makes the scores again instead of storing them.

  Args:
    q: [B T H K]; k: [B T G K], G divides H; v: [B T G V].
    scale: multiplies the scores.
    segments: [B T] int32 document of each token, or None for one document.
    blocks: how many blocks of queries at most; each has at least 128.

  Returns:
    [B T H V] in v's dtype; the softmax is float32. First derivatives only.
  """
  B, T, H, _ = q.shape
  q, k, v = (_heads_first(x, H) for x in (q, k, v))
  if segments is not None:
    segments = jnp.repeat(segments, H, axis=0)
  y = _causal(q, k, v, segments, scale, blocks)
  return y.reshape(B, H, T, -1).transpose(0, 2, 1, 3)


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
  B, T, H, K = q.shape
  G = k.shape[2]
  q = q.reshape(B, T, G, H // G, K)
  mask = positions[..., None] >= jnp.arange(k.shape[1])  # [B T S]
  scores = jnp.einsum(
    'BTGJK,BSGK->BGJTS', q, k, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask[:, None, None], scores * scale, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  y = jnp.einsum('BGJTS,BSGV->BTGJV', weights, v)
  return y.reshape(B, T, H, -1)
