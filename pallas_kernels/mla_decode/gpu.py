"""Absorbed latent attention on Hopper: rows of queries, splits, their merging.

Heads and new tokens are rows of queries alike; 64 of them are a thread block's,
whose kernel depends on the dtype of the latents. The longest requests start
first, so that none of them begins when the others end. Legend: as in
mla_decode; N query rows, T H to a multiple of 64.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import compat, latent_blocks
from pallas_kernels.latent_blocks import LATENT, ROWS
from pallas_kernels.mla_decode import bf16_latents, fp8_latents
from pallas_kernels.mla_decode.request_parts import (
  BLOCK,
  Requests,
  RequestSplits,
)


def mla_decode(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  scale: float,
  scales: jax.Array | None,
  splits: int | None,
) -> jax.Array:
  """Returns the attention of the new tokens [B T H C], bfloat16.

  Raises:
    NotImplementedError: dtypes, widths, a page or a scale that the kernels
      can't take.
  """
  # The maxima of scores are taken before they are scaled.
  if not scale > 0:
    raise NotImplementedError(f'scale {scale}, not above 0')
  check_pages(q_c.dtype, c, k_r, scales)
  B, T, H, _ = q_c.shape
  # Heads and new tokens are rows alike: all of them share the cached tokens.
  rows = -(-T * H // ROWS) * ROWS
  pad = lambda q: jnp.pad(
    q.reshape(B, T * H, -1), ((0, 0), (0, rows - T * H), (0, 0))
  )
  # Padded rows count as the last token's; their output is dropped.
  row_new = jnp.minimum(jnp.arange(rows, dtype=jnp.int32) // H, T - 1)
  if splits is None:
    longest = table.shape[1] * c.shape[1]
    splits = _pick_splits(B * rows // ROWS, longest, compat.num_sms())
  order = jnp.arange(B, dtype=jnp.int32)
  # Where all start at once a sort would be for nothing.
  if B * rows // ROWS * splits > compat.num_sms():
    order = jnp.argsort(lengths, descending=True).astype(jnp.int32)
  requests = Requests(table, lengths, order, row_new)
  cut = RequestSplits(splits, T, c.shape[1] // BLOCK)
  if scales is None:
    run, pages = bf16_latents.partial_sums, (c, k_r)
  else:
    run, pages = fp8_latents.partial_sums, (c, scales, k_r)
  queries = pad(q_c), pad(q_r)
  out, lse = run(queries, _in_blocks(*pages), requests, cut, scale)
  out = out[:, 0] if splits == 1 else latent_blocks.merge(out, lse)[0]
  return out[:, : T * H].reshape(B, T, H, LATENT)


def check_pages(
  queries: jnp.dtype, c: jax.Array, k_r: jax.Array, scales: jax.Array | None
) -> None:
  """Raises NotImplementedError for pages [... P G C] that it can't take.

  Args:
    queries: their dtype.
    c, k_r, scales: as in mla_decode.
  """
  if scales is not None:
    fp8_latents.check_dtypes(queries, c, scales, k_r)
  else:
    bf16_latents.check_dtypes(queries, k_r.dtype, c.dtype)
  _check_sizes(c, k_r)


def _check_sizes(c: jax.Array, k_r: jax.Array) -> None:
  """Raises NotImplementedError for widths or a page that it can't take."""
  latent_blocks.check_dims(c.shape[-1], k_r.shape[-1])
  if c.shape[-2] % BLOCK:
    raise NotImplementedError(f'{c.shape[-2]} tokens a page, not 64 * n')


def _pick_splits(tiles: int, longest: int, sms: int) -> int:
  """Returns splits of a request: fill the device once, 4 blocks each.

  Args:
    tiles: thread blocks without splits.
    longest: tokens that a request can have.
    sms: multiprocessors of the device.
  """
  return max(1, min(sms // tiles, longest // (4 * BLOCK), 32))


def _in_blocks(*pages: jax.Array) -> tuple[jax.Array, ...]:
  """Returns pages [P G D] as blocks [P*G/64 64 D]."""
  return tuple(p.reshape(-1, BLOCK, p.shape[-1]) for p in pages)
