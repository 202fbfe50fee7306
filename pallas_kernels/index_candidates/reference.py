"""The choice among the keys of blocks in XLA, a few queries at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.indexer.reference import scores

_ENTRIES = 2**24  # numbers of gathered keys, or of products, that live at once


def index_candidates(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  starts: jax.Array,
  last: jax.Array,
  size: int,
  top_k: int,
) -> jax.Array:
  """Returns positions [B T K] int32 of the top_k best scores."""
  (B, T, H, I), S = q.shape, k.shape[1]
  M = starts.shape[2] * size
  if 0 in (B, T, S, M):
    return jnp.full((B, T, top_k), -1, jnp.int32)

  def one(query: tuple[jax.Array, ...]) -> jax.Array:
    q, w, starts, last, row = query
    at = (starts[:, None] + jnp.arange(size, dtype=jnp.int32)).reshape(M)
    seen = jnp.repeat(starts >= 0, size) & (at < last)
    some = k[row, jnp.where(seen, at, 0)]  # [M I]
    value = scores(q[None], some, w[None])[0]
    value = jnp.where(seen & (value > -jnp.inf), value, -jnp.inf)  # nan too
    best, where = jax.lax.top_k(value, min(top_k, M))
    # In order of candidates, which is that of positions.
    where = jnp.sort(jnp.where(best > -jnp.inf, where, M))
    chosen = jnp.where(where < M, at[jnp.minimum(where, M - 1)], -1)
    fill = (0, top_k - chosen.shape[0])
    return jnp.pad(chosen, fill, constant_values=-1)

  rows = jnp.repeat(jnp.arange(B, dtype=jnp.int32), T)
  flat = [a.reshape(B * T, *a.shape[2:]) for a in (q, w, starts, last)]
  count = max(1, _ENTRIES // (M * max(H, I)))
  chosen = jax.lax.map(one, (*flat, rows), batch_size=count)
  return chosen.reshape(B, T, top_k)
