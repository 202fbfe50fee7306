"""Holds what sparse latent attention caches (V3.2, arXiv:2512.02556, 2.1).

In rows of its own, or with latents in the pages that an engine keeps them in:
a query reads the few that it chose, whichever pages they lie in, while index
keys are scored all and so are rows.
Legend: B rows, T queries, S slots, K chosen keys, C latent, R rope dim, I index
dim, E blocks of index keys, M pages of all requests, P tokens of a page.
"""

from typing import NamedTuple

import jax

from deepseek_jax.model.attention.latent_reading import Latent
from deepseek_jax.model.attention.paged_latent import PagedLatent


class SparseLatent(NamedTuple):
  """Holds all that the layer caches of tokens; also its cache."""

  c: jax.Array  # [B S C], normed
  kr: jax.Array  # [B S R], rotated
  index: jax.Array  # [B S I], normed and rotated
  # [B E I] of a cache, where keys are looked for in blocks
  means: jax.Array | None = None


class PagedSparseLatent(NamedTuple):
  """Holds the cache of rows whose latents are in pages."""

  latents: PagedLatent
  index: jax.Array  # [B S I]
  means: jax.Array | None = None  # [B E I], as SparseLatent's

  def one_row(
    self, chosen: jax.Array, valid: jax.Array | None
  ) -> tuple[Latent, jax.Array]:
    """Returns all pages as one row of keys, and where the chosen lie in it.

    Args:
      chosen: [B T K] int32 positions of each query's own row; -1 is none.
      valid: [B T] bool, of the queries; None: all. Others read nothing.

    Returns:
      Latents [1 M*P .], and [1 B*T K] int32 places in them, -1 for none.
    """
    B, T, K = chosen.shape
    there = chosen >= 0
    if valid is not None:
      there &= valid[..., None]
    flat = lambda a: a.reshape(B, T * K)
    slots = self.latents.slots(flat(chosen), flat(there))
    keys = jax.tree.map(
      lambda a: a.reshape(1, -1, a.shape[-1]), self.latents.pages
    )
    return keys, slots.reshape(1, B * T, K)
