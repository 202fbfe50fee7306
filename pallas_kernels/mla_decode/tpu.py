"""Absorbed latent attention on TPUs: an online softmax over blocks of pages.

A request's heads and new tokens are rows of queries alike, which share its
tokens. A step multiplies several blocks of its pages: each is an operand of its
own, found in the table, so the pipeline copies those of the next step
meanwhile. Legend: as in mla_decode; N query rows, S tokens of a block, W blocks
of a step.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_calls

# A step costs some 0.35 us beside its work; 512 tokens of V3 are 0.2 to 0.7 us
# of copying, depending on the TPU.
_STEP = 512
_WIDE = 8  # most blocks of a step: every one is two operands
_TILE = 16  # rows of a register of bfloat16, and so of blocks
_LANES = 128
_EMPTY = -1e30


def mla_decode(
  q_c: jax.Array,
  q_r: jax.Array,
  c: jax.Array,
  k_r: jax.Array,
  table: jax.Array,
  lengths: jax.Array,
  scale: float,
  scales: jax.Array | None,
) -> jax.Array:
  """Returns the attention of the new tokens [B T H C], of q_c's dtype.

  Raises:
    NotImplementedError: dtypes, pages or sizes that the kernel can't take.
  """
  check_pages(q_c.dtype, c, k_r, scales)
  if q_r.dtype != q_c.dtype:
    raise NotImplementedError(f'queries of {q_c.dtype} and {q_r.dtype}')
  (B, T, H, C), R, (_, J) = q_c.shape, q_r.shape[-1], table.shape
  N = -(-T * H // _TILE) * _TILE
  S, W = _blocks(c.shape[1], J)
  _check_memory(N, S * W, (C, R), q_c.dtype, table)
  pad = lambda q: jnp.pad(
    q.reshape(B, T * H, -1), ((0, 0), (0, N - T * H), (0, 0))
  )
  per_page = c.shape[1] // S
  places = [_place(i, W, S, per_page, J) for i in range(W)]
  row = lambda width: pl.BlockSpec((None, N, width), lambda b, *_: (b, 0, 0))
  paged = lambda width: [pl.BlockSpec((None, S, width), at) for at in places]
  # As many steps as the longest request has; the others copy nothing in them.
  steps = jnp.maximum(pl.cdiv(lengths.max(), S * W), 1)
  call = pl.pallas_call(
    functools.partial(_body, width=W, new=T, heads=H, scale=scale),
    out_shape=jax.ShapeDtypeStruct((B, N, C), q_c.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, steps),
      in_specs=[row(C), row(R), *paged(C), *paged(R)],
      out_specs=row(C),
      scratch_shapes=[
        pltpu.VMEM((N, width), jnp.float32) for width in (1, 1, C)
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=tpu_calls.interpret(),
    name='mla_decode',
  )
  scalars = table.reshape(-1).astype(jnp.int32), lengths.astype(jnp.int32)
  arrays = tpu_calls.guarded(pad(q_c), pad(q_r), *[c] * W, *[k_r] * W)
  return call(*scalars, *arrays)[:, : T * H].reshape(B, T, H, C)


def check_pages(
  queries: jnp.dtype, c: jax.Array, k_r: jax.Array, scales: jax.Array | None
) -> None:
  """Raises NotImplementedError for pages [... P G C] that it can't take.

  Args:
    queries: their dtype.
    c, k_r, scales: as in mla_decode.
  """
  if scales is not None:
    raise NotImplementedError(
      'float8 latents, which the kernel for TPUs does not dequantise'
    )
  dtypes = [jnp.dtype(a) for a in (queries, c.dtype, k_r.dtype)]
  if dtypes[0] not in (jnp.bfloat16, jnp.float32) or len(set(dtypes)) > 1:
    names = ', '.join(map(str, dtypes))
    raise NotImplementedError(
      f'dtypes {names} of queries, latents and rotary keys, not all bfloat16'
      ' or all float32'
    )
  if c.shape[-2] % _TILE:
    raise NotImplementedError(f'{c.shape[-2]} tokens a page, not {_TILE} * n')


def _blocks(page: int, pages: int) -> tuple[int, int]:
  """Returns tokens of a block, which divide a page, and blocks of a step."""
  size = math.gcd(page, _STEP)
  return size, min(_STEP // size, _WIDE, pages * (page // size))


def vector_memory(
  rows: int, tokens: int, widths: tuple[int, int], itemsize: int
) -> int:
  """Returns an upper estimate of the vector memory of a step, in bytes.

  Args:
    rows, tokens: of a step.
    widths: C and R.
    itemsize: of queries and pages.
  """
  latent, rope = (-(-width // _LANES) * _LANES for width in widths)
  # Twice what is copied while the step before, or after, is computed.
  copied = 2 * (tokens + rows) * (latent + rope) + 2 * rows * latent
  # Joined blocks, latents without what lies behind, probabilities.
  joined = tokens * (2 * latent + rope) + rows * tokens
  sums = rows * (2 * latent + 2 * _LANES + 2 * tokens)
  return itemsize * (copied + joined) + 4 * sums


def _check_memory(
  rows: int,
  tokens: int,
  widths: tuple[int, int],
  dtype: jnp.dtype,
  table: jax.Array,
) -> None:
  """Raises NotImplementedError for what a TPU's memories don't hold."""
  needed = vector_memory(rows, tokens, widths, dtype.itemsize)
  if needed > tpu_calls.VECTORS:
    raise NotImplementedError(
      f'{rows} rows of queries of widths {widths} need {needed >> 20} MiB of'
      f' vector memory, more than {tpu_calls.VECTORS >> 20}'
    )
  if 4 * table.size > tpu_calls.SCALARS // 2:
    raise NotImplementedError(
      f'a table of {table.size} pages, more than fit into scalar memory'
    )


def _place(i: int, wide: int, size: int, per_page: int, pages: int) -> Callable:
  """Returns the index map of the i-th block of a step."""

  def place(
    b: jax.Array, step: jax.Array, table: jax.Ref, lengths: jax.Ref
  ) -> tuple:
    # Behind the last block that holds a token the same is named again, and so
    # not copied; what a page behind it holds is never read.
    last = lax.div(jnp.maximum(lengths[b] - 1, 0), size)
    step = jnp.minimum(step, lax.div(jnp.maximum(last - i, 0), wide))
    at = jnp.minimum(step * wide + i, last)
    page = table[b * pages + lax.div(at, per_page)]
    return page, lax.rem(at, per_page), 0

  return place


def _body(
  table: jax.Ref,
  lengths: jax.Ref,
  q_c: jax.Ref,
  q_r: jax.Ref,
  *refs: jax.Ref,
  width: int,
  new: int,
  heads: int,
  scale: float,
) -> None:
  """Adds a step's tokens to a request's sums; divides at the last step."""
  del table  # of the index maps
  latents, ropes = refs[:width], refs[width : 2 * width]
  out, top, total, acc = refs[2 * width :]
  step, length = pl.program_id(1), lengths[pl.program_id(0)]
  tokens = width * latents[0].shape[0]

  @pl.when(step == 0)
  def _():
    top[...] = jnp.full(top.shape, _EMPTY, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)

  @pl.when(step * tokens < length)
  def _():
    join = lambda blocks: jnp.concatenate([b[...] for b in blocks], axis=0)
    keys = join(latents)  # [W*S C]
    scores = _product(q_c[...], keys, (1, 1))
    scores += _product(q_r[...], join(ropes), (1, 1))
    at = step * tokens + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    row = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    # Filled-up rows count as the last token's; their output is dropped.
    token = jnp.minimum(lax.div(row, heads), new - 1)
    seen = at < length - (new - 1) + token
    scores = jnp.where(seen, scores * scale, _EMPTY)
    highest = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - highest), 0)
    kept = jnp.exp(top[...] - highest)
    top[...] = highest
    total[...] = total[...] * kept + weights.sum(axis=1, keepdims=True)
    # What lies behind the length is arbitrary, and 0 * nan is nan.
    place = step * tokens + lax.broadcasted_iota(jnp.int32, keys.shape, 0)
    keys = jnp.where(place < length, keys, jnp.zeros_like(keys))
    mixed = _product(weights.astype(keys.dtype), keys, (1, 0))
    acc[...] = acc[...] * kept + mixed

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    sums = total[...]
    out[...] = (acc[...] / jnp.where(sums > 0, sums, 1)).astype(out.dtype)


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
  """Returns the product over these axes, in float32."""
  # By default a TPU multiplies float32 as bfloat16.
  exact = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    (((over[0],), (over[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )
