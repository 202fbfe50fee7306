"""Computes latent attention of each query to rows of its own (absorbed form).

What is chosen is the same for all heads, so a query's rows are gathered once:
k rows of C + R numbers, for a block of queries at a time (DeepSeek-V3.2,
arXiv:2512.02556, section 2.1).
Legend: B batch, T queries, S keys, K chosen keys, H heads, C latent, N no-rope
dim, R rope dim, V value dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import absorbing, query_blocks
from deepseek_jax.parallel import products
from deepseek_jax.parallel.masking import MASKED
from pallas_kernels import sparse_mla


class Read(NamedTuple):
  """Holds what reading the chosen tokens gives."""

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
  """Attends from each query to its own few latents (absorbed form).

  Args:
    queries: no-rope [B T H N] and rotated rope part [B T H R].
    keys: latents [B S C] and rotated rope keys [B S R].
    ups: what makes of a latent keys [C H N] and values [C H V].
    chosen: [B T K] int32, rows of the keys; -1 is none.
    scale: multiplies the scores.
    most: queries at a time.
  """

  def block(one: tuple, keys: tuple, ups: tuple) -> Read:
    weights, c = _weights(one, keys, ups[0], scale)
    mixed = products.einsum('BTHK,BTKC->BTHC', weights.astype(c.dtype), c)
    y = absorbing.into_values(mixed, ups[1])
    return Read(y, weights.mean(axis=2))

  return _over_blocks(block, queries, chosen, most, (keys, ups))


def _weights(
  one: tuple, keys: tuple, k_up: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns attention [B n H K] float32 and the latents gathered [B n K C].

  Args:
    one: queries [B n H N] and [B n H R] of a block, and their choice [B n K].
    keys: latents and rotated rope keys.
    k_up: absorbed, that is, it goes into the query.
    scale: multiplies the scores.
  """
  f32 = {'preferred_element_type': jnp.float32}
  qn, qr, at = one
  c, kr = (query_blocks.rows(a, at) for a in keys)  # [B n K .]
  qc = absorbing.into_queries(qn, k_up)
  scores = jnp.einsum('BTHC,BTKC->BTHK', qc, c, **f32)
  scores += jnp.einsum('BTHR,BTKR->BTHK', qr, kr, **f32)
  scores = jnp.where(at[:, :, None] >= 0, scores * scale, MASKED)
  return jax.nn.softmax(scores, axis=-1), c


def _over_blocks(
  block: Callable, queries: tuple, chosen: jax.Array, most: int, shared: tuple
) -> Any:
  """Computes `block` for `most` queries at a time."""
  H, C = queries[0].shape[2], shared[0][0].shape[-1]
  numbers = chosen.shape[-1] * (C + H)
  return query_blocks.over_blocks(
    block, (*queries, chosen), most, numbers, shared
  )


def read_by_kernel(
  impl: str,
  queries: tuple[jax.Array, jax.Array],
  keys: tuple[jax.Array, jax.Array],
  ups: tuple[jax.Array, jax.Array],
  chosen: jax.Array,
  *,
  scale: float,
  shares: bool,
) -> tuple[jax.Array, ...]:
  """Computes y of `read_chosen`; then its shares [B T K 1], of these heads."""
  qc = absorbing.into_queries(queries[0], ups[0])
  given, how = (qc, queries[1]), {'scale': scale, 'impl': impl}
  own = sparse_mla.ChosenKeys(*keys, chosen)
  mixed, log_sum = sparse_mla.attend(*given, (own,), **how)
  y = absorbing.into_values(mixed, ups[1])
  if not shares:
    return (y,)
  # The indexer's target: scored once more, from the log-sum-exp.
  return y, sparse_mla.shares(*given, own, log_sum, **how)[..., None]
