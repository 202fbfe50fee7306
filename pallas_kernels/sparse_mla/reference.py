"""Attention over gathered latents in XLA, a few queries at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mla.keys import ChosenKeys, joined

NONE = -1e30  # log-sum-exp of no score
_ENTRIES = 2**22  # numbers of gathered latents that live at once


def attend(
  q_c: jax.Array,
  q_r: jax.Array | None,
  keys: ChosenKeys,
  sinks: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention [H C] of one query, and its log-sum-exp [H].

  q_c [H C], q_r [H R], index [K] of c [S C] and k_r [S R], float32.
  """
  here = keys.index >= 0
  at = jnp.where(here, keys.index, 0)
  wide = lambda a: a.astype(jnp.float32)
  # Latents that are not chosen may be anything, nan too.
  picked = jnp.where(here[:, None], keys.c[at], 0)
  scores = wide(q_c) @ picked.T
  if q_r is not None:
    shared = jnp.where(here[:, None], keys.k_r[at], 0)
    scores = scores + wide(q_r) @ shared.T
  scores = jnp.where(here, scores * scale, NONE)
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
  width = sum(a.shape[-1] for a in keys[:2] if a is not None)
  size = max(1, _ENTRIES // (keys.index.shape[-1] * width))

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
