"""Computes softmax attention: causal within a batch, and over a cache.

Everything that differs between MHA, GQA and expanded MLA is in the shapes.
Legend: B batch, T queries, S keys, H heads, G key heads, K query/key dim,
V value dim, N = B * H.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import products
from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sharding import in_mesh


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Multiplies [M K] by [K N], accumulated in float32."""
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _blocks(length: int, most: int) -> list[tuple[int, int]]:
  """Returns borders of at most `most` blocks of queries, of 128 or more."""
  size = max(128, -(-length // most))
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def _mask(segments: jax.Array | None, start: int, end: int) -> jax.Array:
  """Returns which keys before `end` the queries start..end attend to.

  [T of the block, S before its end] bool.
  """
  index = jnp.arange(end)
  mask = index[start:, None] >= index
  if segments is None:
    return mask
  return mask & (segments[start:end, None] == segments[:end])


def _over_heads(f: Callable, arrays: tuple) -> Any:
  """Computes f of each entry of the first axis, stacked.

  A CPU takes two heads at a time: their scores stay in its caches, which is
  three times as fast as one batched product (measured). Accelerators, and
  arrays sharded over a mesh, take all at once. The platform that a program is
  lowered for decides, not the host that lowers it.
  """
  at_once = lambda *arrays: jax.vmap(f)(*arrays)
  if in_mesh():
    return at_once(*arrays)
  size = 2 - arrays[0].shape[0] % 2
  by_two = lambda *arrays: jax.lax.map(lambda a: f(*a), arrays, batch_size=size)
  return jax.lax.platform_dependent(*arrays, cpu=by_two, default=at_once)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _causal(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
  scale: float,
  most: int,
) -> jax.Array:
  """Attends causally: q k [N T K], v [N T V], segments [N T] -> [N T V]."""
  return _causal_fwd(q, k, v, segments, scale, most)[0]


def _causal_fwd(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
  scale: float,
  most: int,
) -> tuple[jax.Array, tuple]:
  """Returns the output, and what the backward pass needs of it."""

  def head(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    outs, normalizers = [], []
    for start, end in _blocks(q.shape[0], most):
      scores = _dot(q[start:end], k[:end].T) * scale
      scores = jnp.where(_mask(segments, start, end), scores, MASKED)
      top = scores.max(axis=-1, keepdims=True)
      p = jnp.exp(scores - top)
      total = p.sum(axis=-1, keepdims=True)
      outs.append(_dot(p.astype(v.dtype), v[:end]) / total)
      # The log-sum-exp of the scores is all that is kept of them.
      normalizers.append((top + jnp.log(total))[:, 0])
    out = jnp.concatenate(outs).astype(v.dtype)
    return out, jnp.concatenate(normalizers)

  out, normalizer = _over_heads(head, (q, k, v, segments))
  return out, (q, k, v, segments, out, normalizer)


def _causal_bwd(
  scale: float, most: int, saved: tuple, grad: jax.Array
) -> tuple:
  """Recomputes scores, keys first: then just one product is transposed."""
  f32 = jnp.float32

  def head(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    normalizer: jax.Array,
    grad: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    # sum_s p dp of each query, from the output (FlashAttention).
    delta = (grad.astype(f32) * out.astype(f32)).sum(axis=-1)  # [T]
    dk, dv = jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
    dq = []
    for start, end in _blocks(q.shape[0], most):
      q_block, g_block = q[start:end], grad[start:end]
      scores = _dot(k[:end], q_block.T) * scale  # [S T]
      # The mask goes inside, where a CPU joins it with exp in one pass.
      seen = _mask(segments, start, end).T
      p = jnp.exp(jnp.where(seen, scores - normalizer[start:end], -jnp.inf))
      dv = dv.at[:end].add(_dot(p.astype(v.dtype), g_block))
      dp = _dot(v[:end], g_block.T)
      ds = (p * (dp - delta[start:end]) * scale).astype(q.dtype)
      dk = dk.at[:end].add(_dot(ds, q_block))
      dq.append(_dot(ds.T, k[:end]))
    dq = jnp.concatenate(dq).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)

  return *_over_heads(head, (*saved, grad)), None


_causal.defvjp(_causal_fwd, _causal_bwd)


def _heads_first(x: jax.Array, heads: int) -> jax.Array:
  """Reshapes [B T G K] to [B * heads, T, K]; each of G serves H / G heads."""
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
  """Attends within a batch: a token attends to its segment up to itself.

  Queries go in up to `blocks` unrolled blocks, each against just the keys
  before its end, so close to half of the square is never computed; the
  backward pass recomputes the scores instead of storing them.

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
  """Attends to a cache whose slot s holds the token of position s.

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
  # J = H / G query heads read one key head, which is not repeated.
  scores = jnp.einsum(
    'BTGJK,BSGK->BGJTS', q, k, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask[:, None, None], scores * scale, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  y = products.einsum('BGJTS,BSGV->BTGJV', weights, v)
  return y.reshape(B, T, H, -1)
