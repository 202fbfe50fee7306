"""The indexer's choice in XLA, a few queries at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import FP8

_ENTRIES = 2**24  # products of one head and key that live at once


def scores(
  q: jax.Array, k: jax.Array, w: jax.Array, k_scale: jax.Array | None = None
) -> jax.Array:
  """Returns the scores [T S] float32 of q [T H I], k [S I], w [T H].

  Those of keys in float8 are multiplied by k_scale [S].
  """
  # Whatever rounds products of float32 (TF32, bfloat16) has room for float8.
  q, k = (a.astype(jnp.float32) if a.dtype == FP8 else a for a in (q, k))
  products = jnp.einsum('THI,SI->THS', q, k, preferred_element_type=jnp.float32)
  total = jnp.einsum('THS,TH->TS', jax.nn.relu(products), w.astype(jnp.float32))
  if k_scale is not None:
    total *= k_scale
  return jnp.where(total == 0, 0.0, total)  # -0 would come behind 0


def choose(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  top_k: int,
  k_scale: jax.Array | None = None,
) -> jax.Array:
  """Returns the choice [T K] of one row: q [T H I], k [S I], w [T H].

  Query t chooses among the positions first[t] <= s < last[t]. Keys in float8
  have a k_scale [S].
  """
  S = k.shape[0]
  at = jnp.arange(S, dtype=jnp.int32)
  seen = (at >= first[:, None]) & (at < last[:, None])
  value = scores(q, k, w, k_scale)
  value = jnp.where(seen & (value > -jnp.inf), value, -jnp.inf)  # nan too
  best, where = jax.lax.top_k(value, min(top_k, S))
  where = jnp.where(best > -jnp.inf, where.astype(jnp.int32), S)
  where = jnp.sort(where, axis=-1)
  where = jnp.where(where < S, where, -1)
  fill = ((0, 0), (0, top_k - where.shape[1]))
  return jnp.pad(where, fill, constant_values=-1)


def indexer(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  top_k: int,
  k_scale: jax.Array | None = None,
) -> jax.Array:
  """Returns positions [B T K] int32 of the top_k best scores."""
  (B, T, H, _), S = q.shape, k.shape[1]
  if 0 in (B, T, S):
    return jnp.full((B, T, top_k), -1, jnp.int32)
  size = max(1, _ENTRIES // (H * S))

  def row(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    first: jax.Array,
    last: jax.Array,
    k_scale: jax.Array | None,
  ) -> jax.Array:
    one = lambda a: choose(
      a[0][None], k, a[1][None], a[2][None], a[3][None], top_k, k_scale
    )[0]
    return jax.lax.map(one, (q, w, first, last), batch_size=size)

  scales = [None] * B if k_scale is None else k_scale
  return jnp.stack([row(*args) for args in zip(q, k, w, first, last, scales)])
