"""Holds latents where an engine keeps them: in pages of many requests.

A kernel of decoding reads and fills the pages themselves; XLA's code gathers
those of its rows.
Legend: B rows, T tokens, P tokens of a page, M pages of all requests, n pages
of a row, C latent, R rope dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention.latent_reading import FP8Latent, Latent
from deepseek_jax.model.cache import put_in


class PagedLatent(NamedTuple):
  """Holds the latents of rows; a call's tokens of a row follow one another."""

  pages: Latent | FP8Latent  # each [M P ...]
  table: jax.Array  # [B n] int32, a row's pages in order; -1: none

  def slots(self, positions: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Returns where tokens at positions [B T] lie among all, -1: nowhere."""
    size, n = self.pages.c.shape[1], self.table.shape[1]
    place = jnp.clip(positions // size, 0, n - 1)
    page = jnp.take_along_axis(self.table, place, axis=1)
    there = (positions < n * size) & (page >= 0)
    if valid is not None:
      there &= valid
    return jnp.where(there, page * size + positions % size, -1)

  def written(
    self,
    new: Latent | FP8Latent,
    positions: jax.Array,
    valid: jax.Array | None,
  ) -> 'PagedLatent':
    """Returns the pages with new [B T .], in their format, at [B T]."""
    slots = self.slots(positions, valid).reshape(-1)
    # One slot beyond the last, where mode='drop' writes nothing.
    count, size = self.pages.c.shape[:2]
    slots = jnp.where(slots < 0, count * size, slots)

    def put(pages: jax.Array, new: jax.Array) -> jax.Array:
      width = pages.shape[-1]
      flat, new = pages.reshape(-1, width), new.reshape(-1, width)
      put = lambda flat, slots, new: flat.at[slots].set(new, mode='drop')
      new = new.astype(pages.dtype)
      flat = put_in(put, flat, slots, new, slots=len(flat))
      return flat.reshape(pages.shape)

    return self._replace(pages=type(new)(*map(put, self.pages, new)))

  def gathered(self, lengths: jax.Array) -> Latent | FP8Latent:
    """Returns the latents of the rows, [B n P .]; zero behind lengths [B]."""

    def take(pages: jax.Array) -> jax.Array:
      rows = pages[jnp.maximum(self.table, 0)]  # [B n P .]
      rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
      seen = jnp.arange(rows.shape[1]) < lengths[:, None]
      return jnp.where(seen[..., None], rows, 0)

    return jax.tree.map(take, self.pages)


def last_first(queries: jax.Array, count: jax.Array) -> jax.Array:
  """Returns queries [B T ...] turned so that the first `count` [B] are last."""
  T = queries.shape[1]
  at = (jnp.arange(T) + count[:, None]) % T
  return queries[jnp.arange(queries.shape[0])[:, None], at]
