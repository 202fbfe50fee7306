"""Lists of latents and what queries choose of them.

Legend: B batch, T queries, S latents, C latent, R rope dim, K chosen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ChosenKeys(NamedTuple):
  """Holds latents, and which of them each query reads.

  Attributes:
    c: [B S C] keys and values.
    k_r: [B S R] shared rotary keys, or None without any.
    index: [B T K] int32 positions in them; one outside of 0..S-1 chooses
      nothing.
  """

  c: jax.Array
  k_r: jax.Array | None
  index: jax.Array


def known(keys: ChosenKeys) -> ChosenKeys:
  """Returns the keys with -1 for each position that is none."""
  index = jnp.asarray(keys.index)
  # A position past a row's end would be one of the next row.
  here = (index >= 0) & (index < keys.c.shape[1])
  return keys._replace(index=jnp.where(here, index.astype(jnp.int32), -1))


def joined(keys: tuple[ChosenKeys, ...]) -> ChosenKeys:
  """Returns all of them in one list, one after the other."""
  if len(keys) == 1:
    return keys[0]
  begin, ats = 0, []
  for one in keys:
    ats.append(jnp.where(one.index >= 0, one.index + begin, -1))
    begin += one.c.shape[1]
  c, k_r = (
    None if parts[0] is None else jnp.concatenate(parts, axis=1)
    for parts in zip(*(one[:2] for one in keys))
  )
  return ChosenKeys(c, k_r, jnp.concatenate(ats, axis=2))
