"""Latent attention of each query to rows of its own (absorbed form).

What is chosen is the same for all heads, so a query's rows are gathered once:
k rows of C + R numbers, for a block of queries at a time (DeepSeek-V3.2,
arXiv:2512.02556, section 2.1).
Legend: B batch, T queries, S keys, K chosen keys, H heads, C latent, N no-rope
dim, R rope dim, V value dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import query_blocks
from deepseek_jax.parallel.masking import MASKED
from pallas_kernels.sparse_mla import sparse_mla


class Read(NamedTuple):
  """What reading the chosen tokens gives."""

  y: jax.Array  # [B T H V]
  shares: jax.Array | None  # [B T K] float32: the heads' mean attention


def read_chosen(
  queries: tuple[jax.Array, jax.Array],
  keys: tuple[jax.Array, jax.Array],
  ups: tuple[jax.Array, jax.Array],
  chosen: jax.Array,
  *,
  scale: float,
  most: int = 128,
) -> Read:
  """Attention of each query to its own few latents (absorbed form).

  Args:
    queries: no-rope [B T H N] and turned rope part [B T H R].
    keys: latents [B S C] and turned rope keys [B S R].
    ups: what makes of a latent keys [C H N] and values [C H V].
    chosen: [B T K] int32, rows of the keys; -1 is none.
    scale: multiplies the scores.
    most: queries at a time.
  """
  f32 = {'preferred_element_type': jnp.float32}

  def block(one, keys, ups):
    (qn, qr, at), (k_up, v_up) = one, ups
    c, kr = (query_blocks.rows(a, at) for a in keys)  # [B n K .]
    qc = jnp.einsum('BTHN,CHN->BTHC', qn, k_up)
    scores = jnp.einsum('BTHC,BTKC->BTHK', qc, c, **f32)
    scores += jnp.einsum('BTHR,BTKR->BTHK', qr, kr, **f32)
    scores = jnp.where(at[:, :, None] >= 0, scores * scale, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum('BTHK,BTKC->BTHC', weights.astype(c.dtype), c)
    y = jnp.einsum('BTHC,CHV->BTHV', mixed, v_up)
    return Read(y, weights.mean(axis=2))

  C, H, _ = ups[0].shape
  numbers = chosen.shape[-1] * (C + H)
  return query_blocks.over_blocks(
    block, (*queries, chosen), most, numbers, (keys, ups)
  )


def read_by_kernel(queries, keys, ups, chosen, *, scale: float, impl) -> Read:
  """`read_chosen` without the shares."""
  qc = jnp.einsum('BTHN,CHN->BTHC', queries[0], ups[0])
  mixed = sparse_mla(qc, queries[1], *keys, chosen, scale=scale, impl=impl)
  return Read(jnp.einsum('BTHC,CHV->BTHV', mixed, ups[1]), None)
