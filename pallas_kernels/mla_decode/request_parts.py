"""Cuts requests into what thread blocks compute: query rows, runs of tokens.

Heads and new tokens of a request are query rows alike, 64 a thread block; the
request's tokens lie in blocks of 64, of which a split is a run. Legend: as in
mla_decode; N query rows, T H to a multiple of 64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, latent_blocks
from pallas_kernels.latent_blocks import BY_ROW, LATENT, ROWS

BLOCK = 64


class Requests(NamedTuple):
  """Holds what says where the tokens of requests lie, int32.

  Attributes:
    table: [B J] and lengths: [B], as in mla_decode.
    order: [B], the requests in the order in which they start.
    row_new: [N], the new token that each row belongs to.
  """

  table: jax.Array
  lengths: jax.Array
  order: jax.Array
  row_new: jax.Array


class RequestSplits(NamedTuple):
  """Says how requests are cut into parts.

  Attributes:
    splits: of a request's tokens.
    new: T.
    per_page: blocks of a page.
  """

  splits: int
  new: int
  per_page: int


class RequestPart(NamedTuple):
  """Names what this thread block computes.

  Attributes:
    requests, cut: see there; of references.
    b, split: the request, and which split of it.
    rows: its 64 of the N query rows.
    first, last: its blocks of tokens, first <= block < last.
    length: tokens of the request.
  """

  requests: Requests
  cut: RequestSplits
  b: jax.Array
  split: jax.Array
  rows: pl.Slice
  first: jax.Array
  last: jax.Array
  length: jax.Array

  def place(self, block: jax.Array) -> jax.Array:
    """Returns where a block lies; behind the last one, where that lies."""
    block, per_page = jnp.minimum(block, self.last - 1), self.cut.per_page
    page = self.requests.table[self.b, lax.div(block, per_page)]
    return page * per_page + lax.rem(block, per_page)

  def masked(self, s: jax.Array, key: jax.Array) -> jax.Array:
    """Returns scores [64 K] of tokens from `key` on, -inf of those not seen."""
    # New token t attends to all but the T - 1 - t newest tokens.
    old = self.length - (self.cut.new - 1)

    def mask(s: jax.Array) -> jax.Array:
      newer = compat.load(
        self.requests.row_new, self.rows, BY_ROW, optimized=False
      )
      return latent_blocks.mask_from(s, newer + (old - key))

    return lax.cond(key + s.shape[1] > old, mask, lambda s: s, s)


def own_part(requests: Requests, cut: RequestSplits) -> RequestPart:
  """Returns this thread block's part."""
  place, tile, split = (lax.axis_index(a) for a in ('request', 'tile', 'split'))
  b = requests.order[place]
  length = requests.lengths[b]
  blocks = lax.div(length + (BLOCK - 1), BLOCK)
  per_split = lax.div(blocks + (cut.splits - 1), cut.splits)
  first = split * per_split
  last = jnp.minimum(first + per_split, blocks)
  rows = pl.ds(tile * ROWS, ROWS)
  return RequestPart(requests, cut, b, split, rows, first, last, length)


def run(
  body: Callable,
  queries: tuple[jax.Array, jax.Array],
  pages: tuple[jax.Array, ...],
  requests: Requests,
  cut: RequestSplits,
  scratch: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention of each split alone, to be merged by its lse.

  Args:
    body: (queries, pages, requests, out, lse, **scratch), all references.
    queries: [B N C] and [B N R] bfloat16.
    pages: [blocks 64 ...] each, the cache of all requests.
    requests, cut: see there.
    scratch: of two warpgroups.

  Returns:
    out [B splits N C] bfloat16 and lse [B splits N] float32, base 2.
  """
  B, rows, _ = queries[0].shape
  return compat.kernel(
    body,
    (
      jax.ShapeDtypeStruct((B, cut.splits, rows, LATENT), jnp.bfloat16),
      jax.ShapeDtypeStruct((B, cut.splits, rows), jnp.float32),
    ),
    grid={'request': B, 'tile': rows // ROWS, 'split': cut.splits},
    threads=2,
    across_warps=False,
    scratch=scratch,
  )(queries, pages, requests)
