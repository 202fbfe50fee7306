"""Computes softmax attention in parts: each over some keys, joined by log-sums.

All heads share one key per place, which is the value too (V4). A part is
normalised by itself; how much it counts follows from its log-sum-exp, and a
sink (a logit without a value) takes its share when parts are joined.
Legend: B batch, T queries, S keys, K keys of a query, H heads, C head dim,
n queries of a block, W window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention.query_blocks import over_blocks
from deepseek_jax.parallel.masking import MASKED


class PartialSoftmax(NamedTuple):
  """Holds attention to some keys, normalised over these."""

  out: jax.Array  # [... T H C]
  log_sum: jax.Array  # [... T H] float32


def attend(
  q: jax.Array, keys: jax.Array, seen: jax.Array, scale: float
) -> tuple[PartialSoftmax, jax.Array]:
  """Attends to keys that are also the values.

  Args:
    q: [... T H C].
    keys: [... S C], or [... T K C] with keys of each query's own.
    seen: bool, [... T S] or [... T K].
    scale: multiplies the scores.

  Returns:
    The part, and the weights [... T H S] float32.
  """
  # Keys as deep as queries are each query's own.
  form = '...TSC' if keys.ndim == q.ndim else '...SC'
  scores = jnp.einsum(
    f'...THC,{form}->...THS', q, keys, preferred_element_type=jnp.float32
  )
  scores = jnp.where(seen[..., None, :], scores * scale, MASKED)
  log_sum = jax.nn.logsumexp(scores, axis=-1)
  weights = jnp.exp(scores - log_sum[..., None])
  out = jnp.einsum(
    f'...THS,{form}->...THC',
    weights.astype(keys.dtype),
    keys,
    preferred_element_type=jnp.float32,
  )
  return PartialSoftmax(out, log_sum), weights


def join(parts: list[PartialSoftmax], sinks: jax.Array) -> jax.Array:
  """Joins parts over different keys and sinks [H]: [B T H C] float32."""
  logs = jnp.stack([p.log_sum for p in parts])
  sinks = jnp.broadcast_to(sinks.astype(jnp.float32), logs.shape[1:])
  total = jax.nn.logsumexp(jnp.concatenate([logs, sinks[None]]), axis=0)
  shares = jnp.exp(logs - total)
  return sum(s[..., None] * p.out for s, p in zip(shares, parts))


def window_attention(
  q: jax.Array,
  keys: jax.Array,
  segments: jax.Array,
  window: int,
  *,
  scale: float,
  history: tuple[jax.Array, jax.Array] | None = None,
) -> PartialSoftmax:
  """Attends from each query to itself and the W - 1 tokens before it.

  Queries go in blocks of at least W, each against its own and the end of the
  block before: the cost is linear in T.

  Args:
    q: [B T H C].
    keys: [B T C].
    segments: [B T] document of each token; it attends to no other.
    window: W.
    scale: multiplies the scores.
    history: keys [B W-1 C] and segments [B W-1] of the tokens before, or None.
  """
  B, T, H, C = q.shape
  if history is None:
    history = (
      jnp.zeros((B, window - 1, C), keys.dtype),
      jnp.full((B, window - 1), -1, segments.dtype),
    )
  size = max(window, 128)
  size = T if size >= T else size
  count = -(-T // size)

  def blocks(x: jax.Array) -> jax.Array:
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, size * count - T), *rest])
    return x.reshape(B, count, size, *x.shape[2:])

  def with_history(x: jax.Array, first: jax.Array) -> jax.Array:
    x = blocks(x)
    if count > 1:
      ends = x[:, :-1, size - (window - 1) :]
      first = jnp.concatenate([first[:, None], ends], axis=1)
    else:
      first = first[:, None]
    return jnp.concatenate([first, x], axis=2)  # [B count W-1+size ...]

  def block(one: tuple) -> PartialSoftmax:
    q, own, keys, theirs = one
    ahead = jnp.arange(keys.shape[2]) - jnp.arange(size)[:, None]
    seen = (ahead >= 0) & (ahead < window)
    seen = seen & (own[..., None] == theirs[:, :, None])
    return attend(q, keys, seen, scale)[0]

  one = (
    blocks(q),
    blocks(segments),
    with_history(keys, history[0]),
    with_history(segments, history[1]),
  )
  part = over_blocks(block, one, count, size * (size + window) * H)
  flat = lambda x: x.reshape(B, count * size, *x.shape[3:])[:, :T]
  return PartialSoftmax(*map(flat, part))
