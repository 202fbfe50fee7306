"""Holds what sparse latent attention caches (V3.2, arXiv:2512.02556, 2.1).

In rows of its own, or with latents in the pages that an engine keeps them in:
a query reads the few that it chose, whichever pages they lie in, while index
keys are scored all and so are rows.
Legend: B rows, T queries, S slots, K chosen keys, C latent, R rope dim, I index
dim, E blocks of index keys, M pages of all requests, P tokens of a page.
"""

from typing import NamedTuple

import jax

from deepseek_jax.model.attention import index_blocks, index_codes
from deepseek_jax.model.attention.index_codes import Keys
from deepseek_jax.model.attention.indexer import IndexBlocksConfig
from deepseek_jax.model.attention.latent_reading import FP8Latent, Latent
from deepseek_jax.model.attention.paged_latent import PagedLatent


class SparseLatent(NamedTuple):
  """Holds all that the layer caches of tokens; also its cache."""

  c: jax.Array  # [B S C], normed
  kr: jax.Array  # [B S R], rotated
  index: Keys  # [B S I], normed and rotated
  # [B E I] of a cache, where keys are looked for in blocks
  means: jax.Array | None = None
  scales: jax.Array | None = None  # of c in float8, as FP8Latent's

  @property
  def latents(self) -> Latent | FP8Latent:
    """Returns what is read of chosen tokens."""
    if self.scales is None:
      return Latent(self.c, self.kr)
    return FP8Latent(self.c, self.kr, self.scales)


def empty(
  latents: Latent | FP8Latent, keys: Keys, blocks: IndexBlocksConfig | None
) -> SparseLatent:
  """Returns a cache of no token.

  Args:
    latents: of no token, [B S .].
    keys: of the indexer, of no token, [B S I].
    blocks: in which keys are looked for, or None.
  """
  c, kr, *scales = latents
  means = None
  if blocks:
    means = index_blocks.empty(blocks, jax.eval_shape(index_codes.wide, keys))
  return SparseLatent(c, kr, keys, means, *scales)


class PagedSparseLatent(NamedTuple):
  """Holds the cache of rows whose latents are in pages."""

  latents: PagedLatent
  index: Keys  # [B S I]
  means: jax.Array | None = None  # [B E I], as SparseLatent's

  def one_row(
    self, chosen: jax.Array, valid: jax.Array | None
  ) -> tuple[Latent | FP8Latent, jax.Array]:
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
