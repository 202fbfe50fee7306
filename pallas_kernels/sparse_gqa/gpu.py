"""Grouped-query attention over gathered rows, by the kernels of sparse_mla.

These attend to rows that are keys and values at once, and take of a query as
many columns of each. So a value and its key lie side by side in a row, a query
is zero beside its values' columns, and of the output those alone are kept: no
number but padding is gathered for nothing. A group's heads are the rows of the
matrix products, of which there are 64: of 16 heads three quarters are padding.
Legend: as in sparse_gqa; C and R as in sparse_mla.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.latent_blocks import ROPE
from pallas_kernels.sparse_mla import gpu as latent
from pallas_kernels.sparse_mla.keys import ChosenKeys


class Packing(NamedTuple):
  """Says where key and value lie in a row of sparse_mla.

  Attributes:
    width: C; values begin at 0, keys right after them.
    rope: R, how many of a key's last columns are the rotary key's.
  """

  width: int
  rope: int


def packing_of(keys: int, values: int) -> Packing:
  """Returns the narrowest row for K and V.

  Raises:
    NotImplementedError: there is none.
  """
  for width in sorted(latent.WIDTHS):
    for rope in (0, ROPE):
      if values + keys - rope <= width and rope <= keys:
        return Packing(width, rope)
  most = max(latent.WIDTHS) + ROPE
  raise NotImplementedError(
    f'keys of {keys} and values of {values}, not {most} together'
  )


def sparse_gqa(
  q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array, scale: float
) -> jax.Array:
  """Returns the attention [B T G J V], bfloat16.

  Raises:
    NotImplementedError: dtypes or widths that the kernel can't take.
  """
  (B, T, G, J, K), V = q.shape, v.shape[-1]
  row = packing_of(K, V)
  # A group is a row of the batch: [B G ...].
  apart = lambda a: jnp.moveaxis(a, 2, 1).reshape(
    B * G, a.shape[1], *a.shape[3:]
  )
  q, k, v, index = map(apart, (q, k, v, index))
  # All but the last R columns of a key follow the value.
  cut = K - row.rope
  fill = row.width - V - cut
  wide = lambda a, before, after: jnp.pad(
    a, [(0, 0)] * (a.ndim - 1) + [(before, after)]
  )
  q_c = wide(q[..., :cut], V, fill)
  c = wide(jnp.concatenate([v, k[..., :cut]], axis=-1), 0, fill)
  q_r, k_r = (q[..., cut:], k[..., cut:]) if row.rope else (None, None)
  keys = (ChosenKeys(c, k_r, index),)
  out, _ = latent.sparse_mla(q_c, q_r, keys, None, scale)
  return jnp.moveaxis(out[..., :V].reshape(B, G, T, J, V), 1, 2)
