"""Computes latent attention of each query to rows of its own (absorbed form).

What is chosen is the same for all heads, so a query's rows are gathered once:
k rows of C + R numbers, for a block of queries at a time (DeepSeek-V3.2,
arXiv:2512.02556, section 2.1). Rows in float8 are dequantised as they are read.
Legend: B batch, T queries, S keys, K chosen keys, H heads, C latent, N no-rope
dim, R rope dim, V value dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import absorbing, query_blocks
from deepseek_jax.model.attention.latent_reading import (
  FP8Latent,
  Latent,
  decoded,
)
from deepseek_jax.parallel import products
from deepseek_jax.parallel.masking import MASKED
from pallas_kernels import sparse_mla


class Read(NamedTuple):
  """Holds what reading the chosen tokens gives."""

  y: jax.Array  # [B T H V]
  shares: jax.Array | None  # [B T K] float32: the heads' mean attention


def read_chosen(
  queries: tuple[jax.Array, jax.Array],
  keys: Latent | FP8Latent,
  ups: tuple[jax.Array, jax.Array],
  chosen: jax.Array,
  *,
  scale: float,
  most: int = 128,
) -> Read:
  """Attends from each query to its own few latents (absorbed form).

  Args:
    queries: no-rope [B T H N] and rotated rope part [B T H R].
    keys: latents [B S C] and rotated rope keys [B S R]; in float8 scales, too.
    ups: what makes of a latent keys [C H N] and values [C H V].
    chosen: [B T K] int32, rows of the keys; -1 is none.
    scale: multiplies the scores.
    most: queries at a time.
  """

  def block(one: tuple, keys: Latent | FP8Latent, ups: tuple) -> Read:
    weights, c = _weights(one, keys, ups[0], scale)
    mixed = products.einsum('BTHK,BTKC->BTHC', weights.astype(c.dtype), c)
    y = absorbing.into_values(mixed, ups[1])
    return Read(y, weights.mean(axis=2))

  return _over_blocks(block, queries, chosen, most, (keys, ups))


def _weights(
  one: tuple, keys: Latent | FP8Latent, k_up: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns attention [B n H K] float32 and the latents gathered [B n K C].

  Args:
    one: queries [B n H N] and [B n H R] of a block, and their choice [B n K].
    keys: latents and rotated rope keys; in float8 scales, too.
    k_up: absorbed, that is, it goes into the query.
    scale: multiplies the scores.
  """
  f32 = {'preferred_element_type': jnp.float32}
  qn, qr, at = one
  c, kr = decoded(_rows(keys, at), qn.dtype)  # [B n K .]
  qc = absorbing.into_queries(qn, k_up)
  scores = jnp.einsum('BTHC,BTKC->BTHK', qc, c, **f32)
  scores += jnp.einsum('BTHR,BTKR->BTHK', qr, kr, **f32)
  scores = jnp.where(at[:, :, None] >= 0, scores * scale, MASKED)
  return jax.nn.softmax(scores, axis=-1), c


def _rows(keys: Latent | FP8Latent, at: jax.Array) -> Latent | FP8Latent:
  """Returns keys [B S .] at places [B ...]: [B ... .], in their format."""
  return jax.tree.map(lambda a: query_blocks.rows(a, at), keys)


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
  keys: Latent | FP8Latent,
  ups: tuple[jax.Array, jax.Array],
  chosen: jax.Array,
  *,
  scale: float,
  shares: bool,
) -> tuple[jax.Array, ...]:
  """Computes y of `read_chosen`; then its shares [B T K 1], of these heads."""
  qc = absorbing.into_queries(queries[0], ups[0])
  given, how = (qc, queries[1]), {'scale': scale, 'impl': impl}
  if isinstance(keys, FP8Latent):
    keys, chosen = _dequantised(keys, chosen, qc.dtype)
  own = sparse_mla.ChosenKeys(*keys, chosen)
  mixed, log_sum = sparse_mla.attend(*given, (own,), **how)
  y = absorbing.into_values(mixed, ups[1])
  if not shares:
    return (y,)
  # The indexer's target: scored once more, from the log-sum-exp.
  return y, sparse_mla.shares(*given, own, log_sum, **how)[..., None]


def _dequantised(
  keys: FP8Latent, chosen: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[Latent, jax.Array]:
  """Returns latents of no format for the kernel, and the chosen among them.

  They are what is chosen, where that is less than all there is.

  Args:
    keys: [B S .].
    chosen: [B T K], -1 for none.
    dtype: of the latents.
  """
  B, T, K = chosen.shape
  if keys.c.shape[1] > T * K:
    keys = _rows(keys, chosen.reshape(B, T * K))
    place = jnp.arange(T * K, dtype=jnp.int32).reshape(T, K)
    chosen = jnp.where(chosen >= 0, place, -1)
  return decoded(keys, dtype), chosen
