"""The indexer's choice of few queries, whose keys thread blocks share.

A thread block scores a part of the keys for two queries; with one alone per
pair, as decoding has few, most of a device would idle. Scores lie in global
memory as integers of the same order, and XLA picks the best (bits).
Legend: B batch, T queries (even), S keys (padded), H index heads.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.indexer import bits, scores
from pallas_kernels.indexer.scores import BLOCK, BY_COLUMN

_LEAST = 8  # rows of 64 keys of a part


def parts(pairs: int, rows: int) -> int:
  """Returns the thread blocks that share a pair of queries' keys.

  Args:
    pairs: of queries.
    rows: of 64 keys.
  """
  sms = compat.num_sms()
  # Two of them fit a multiprocessor.
  return 1 if 2 * pairs > sms else max(1, min(2 * sms // pairs, rows // _LEAST))


def select(
  q: jax.Array,
  k: jax.Array,
  w: jax.Array,
  first: jax.Array,
  last: jax.Array,
  *scales: jax.Array,
  top_k: int,
  parts: int,
) -> jax.Array:
  """Returns the choice as bits, uint32 [B T S/32], the lowest key first.

  `scales` [B S/64 64] are those of keys in float8, else there are none.
  """
  B, T, H, _ = q.shape
  S = k.shape[1]
  ordered = compat.kernel(
    functools.partial(_body, parts=parts),
    jax.ShapeDtypeStruct((B, T, S // BLOCK, BLOCK), jnp.int32),
    grid={'row': B, 'pair': T // 2, 'part': parts},
    threads=2,
    scratch=list(scores.scratch(H, q.dtype).values()),
  )(q, k, w, first, last, *scales)
  words = bits.best(ordered.reshape(B * T, S), top_k)
  return words.reshape(B, T, -1)


def _body(
  q: jax.Ref, k: jax.Ref, w: jax.Ref, first: jax.Ref, last: jax.Ref,
  *rest: jax.Ref, parts: int,
) -> None:  # fmt: skip
  """Scores a part of the keys for a pair of queries, one a warpgroup.

  `rest` are the scales of keys in float8, the output, and scratch.
  """
  *scales, ordered, qs, ks, q_here, here, free = rest
  b, pair, part, g = (lax.axis_index(a) for a in ('row', 'pair', 'part', 'wg'))
  t, rows = 2 * pair + g, ordered.shape[2]
  plgpu.copy_gmem_to_smem(q.at[b, t], qs.at[g], q_here.at[g])
  # Of whole steps, as the rows are.
  step = ks.shape[1] // BLOCK
  each = -(-rows // (parts * step)) * step
  low = part * each
  high = jnp.minimum(low + each, rows)
  span, (start, end) = scores.spans(first, last, b, pair, ks.shape[1])
  start, end = jnp.clip(start, low, high), jnp.clip(end, low, high)
  plgpu.barrier_wait(q_here.at[g])
  kept = ordered.at[b, t]
  scores.score_keys(
    k.at[b], compat.load(w, (b, t), BY_COLUMN, optimized=False),
    qs.at[g], ks, kept, here, free, start=start, end=end, span=span,
    scales=scores.scales_at(*scales, b) if scales else None,
  )  # fmt: skip
  # What no query of the pair sees is no key.
  scores.fill(kept, low, start)
  scores.fill(kept, end, high)
