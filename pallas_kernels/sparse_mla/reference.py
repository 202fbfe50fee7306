"""Attention over gathered latents in XLA, a few queries at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mla.keys import ChosenKeys, joined

NONE = -1e30  # log-sum-exp of no score
_ENTRIES = 2**22  # numbers of gathered latents that live at once


def _scores(
  q_c: jax.Array, q_r: jax.Array | None, keys: ChosenKeys, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns a query's scores [H K], NONE of no choice, and the latents [K C].

  q_c [H C], q_r [H R], index [K] of c [S C] and k_r [S R], float32.
  """
  here = keys.index >= 0
  at = jnp.where(here, keys.index, 0)
  # Latents that are not chosen may be anything, nan too.
  picked = jnp.where(here[:, None], keys.c[at], 0)
  scores = q_c.astype(jnp.float32) @ picked.T
  if q_r is not None:
    shared = jnp.where(here[:, None], keys.k_r[at], 0)
    scores = scores + q_r.astype(jnp.float32) @ shared.T
  return jnp.where(here, scores * scale, NONE), picked


def attend(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: ChosenKeys,
  sinks: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention [H C] of one query, and its log-sum-exp [H].

  Of arrays as of `_scores`.
  """
  here = keys.index >= 0
  wide = lambda a: a.astype(jnp.float32)
  scores, picked = _scores(q_c, q_r, keys, scale)
  top = scores.max(-1)
  if sinks is not None:
    top = jnp.maximum(top, wide(sinks))
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(here, jnp.exp(scores - top[:, None]), 0)
  total = weights.sum(-1)
  if sinks is not None:
    # A score without a value: it takes its share.
    total = total + jnp.exp(wide(sinks) - top)
  safe = jnp.where(total > 0, total, 1)
  out = ((weights / safe[:, None]) @ picked).astype(q_c.dtype)
  return out, jnp.where(total > 0, top + jnp.log(safe), NONE)


def sparse_mla(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: tuple[ChosenKeys, ...],
  sinks: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention [B T H C] and its log-sum-exp [B T H]."""
  keys = joined(keys)
  if not keys.index.size:
    log_sum = jnp.full(q_c.shape[:-1], NONE) if sinks is None else sinks
    log_sum = log_sum.astype(jnp.float32)
    return jnp.zeros_like(q_c), jnp.broadcast_to(log_sum, q_c.shape[:-1])
  size = _at_once(keys)

  def row(b: int) -> tuple[jax.Array, jax.Array]:
    queries, own = jax.tree.map(lambda a: a[b], ((q_c, q_r), keys))
    # Before the loop, so that all queries' gradients add up in float32.
    latents = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), own[:2])
    one = jax.checkpoint(
      lambda a: attend(*a[0], ChosenKeys(*latents, a[1]), sinks, scale)
    )
    return jax.lax.map(one, (queries, own.index), batch_size=size)

  rows = [row(b) for b in range(q_c.shape[0])]
  return jax.tree.map(lambda *a: jnp.stack(a), *rows)


def _at_once(keys: ChosenKeys) -> int:
  """Returns how many queries' latents are gathered at a time."""
  width = sum(a.shape[-1] for a in keys[:2] if a is not None)
  return max(1, _ENTRIES // (keys.index.shape[-1] * width))


def shares(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: ChosenKeys,
  log_sum: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns the mean over heads of the attention to each choice, [B T K]."""
  if not keys.index.size or not log_sum.size:
    return jnp.zeros(keys.index.shape, jnp.float32)

  def row(one: tuple) -> jax.Array:
    (q_c, q_r, log_sum), own = one
    latents = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), own[:2])

    def query(one: tuple) -> jax.Array:
      q_c, q_r, log_sum, index = one
      scores, _ = _scores(q_c, q_r, ChosenKeys(*latents, index), scale)
      weights = jnp.exp(scores - log_sum[:, None])
      return jnp.where(index >= 0, weights, 0).mean(0)

    given = q_c, q_r, log_sum, own.index
    return jax.lax.map(query, given, batch_size=_at_once(keys))

  return jax.lax.map(row, ((q_c, q_r, log_sum), keys))
