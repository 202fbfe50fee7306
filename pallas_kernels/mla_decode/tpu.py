"""Absorbed latent attention on TPUs: an online softmax over blocks of pages.

A request's heads and new tokens are rows of queries alike, which share its
tokens. While a step multiplies several blocks of its pages, those of the next
step, or of the next request, are copied: each is found in the table. Legend: as
in mla_decode; N query rows, S tokens of a block, W blocks of a step.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_calls

_STEP = 512  # tokens of a step
_CORES = 2  # of a v4 or v5p, which share the requests; others have one
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
  cores = min(B, _CORES)
  each = -(-B // cores)
  S, W = _blocks(c.shape[1], J)
  _check_memory(N, S * W, (C, R), q_c.dtype, table)
  # Requests that fill up the last core's share have length 0.
  more = each * cores - B
  pad = lambda q: jnp.pad(
    q.reshape(B, T * H, -1), ((0, more), (0, N - T * H), (0, 0))
  )
  row = lambda width: pl.BlockSpec(
    (None, N, width), lambda core, i, *_: (core * each + i, 0, 0)
  )
  pages = pl.BlockSpec(memory_space=pl.ANY)
  vectors = lambda *shape, dtype=c.dtype: pltpu.VMEM(shape, dtype)
  sums = [vectors(N, width, dtype=jnp.float32) for width in (1, 1, C)]
  call = pl.pallas_call(
    functools.partial(_body, cut=_Cut(S, W, J, T, H, scale)),
    out_shape=jax.ShapeDtypeStruct((cores * each, N, C), q_c.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(cores, each),
      in_specs=[row(C), row(R), pages, pages],
      out_specs=row(C),
      scratch_shapes=[
        vectors(2, S * W, C),
        vectors(2, S * W, R),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
        *sums,
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=tpu_calls.interpret(),
    name='mla_decode',
  )
  lengths = jnp.pad(lengths.astype(jnp.int32), (0, more))
  arrays = tpu_calls.guarded(pad(q_c), pad(q_r), c, k_r)
  out = call(table.reshape(-1).astype(jnp.int32), lengths, *arrays)
  return out[:B, : T * H].reshape(B, T, H, C)


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
  return size, min(_STEP // size, pages * (page // size))


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
  # A step's latents and keys, latents without what lies behind, weights.
  read = tokens * (2 * latent + rope) + rows * tokens
  sums = rows * (2 * latent + 2 * _LANES + 2 * tokens)
  return itemsize * (copied + read) + 4 * sums


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


class _Cut(NamedTuple):
  """Describes how requests are cut into steps.

  Attributes:
    size, wide: tokens of a block, and blocks of a step.
    pages: of a request.
    new, heads: T and H.
    scale: of the scores.
  """

  size: int
  wide: int
  pages: int
  new: int
  heads: int
  scale: float

  @property
  def tokens(self) -> int:
    """Returns the tokens of a step."""
    return self.size * self.wide


class _Copies(NamedTuple):
  """Copies blocks from pages in HBM to one of two buffers in VMEM."""

  table: jax.Ref
  lengths: jax.Ref
  pages: tuple[jax.Ref, jax.Ref]
  buffers: tuple[jax.Ref, jax.Ref]
  done: jax.Ref
  cut: _Cut

  def each(
    self,
    action: str,
    b: jax.Array,
    step: jax.Array | int,
    slot: jax.Array | int,
  ) -> None:
    """Starts, or waits for, the copies of a step's blocks that hold tokens."""
    size, wide, pages, *_ = self.cut
    per_page = self.pages[0].shape[1] // size
    held = lax.div(self.lengths[b] + size - 1, size) - step * wide

    def one(i: jax.Array, _: None) -> None:
      at = step * wide + i
      page = self.table[b * pages + lax.div(at, per_page)]
      source = pl.ds(pl.multiple_of(lax.rem(at, per_page) * size, size), size)
      place = pl.ds(pl.multiple_of(i * size, size), size)
      for ref, buffer in zip(self.pages, self.buffers):
        copy = pltpu.make_async_copy(
          ref.at[page, source], buffer.at[slot, place], self.done.at[slot]
        )
        getattr(copy, action)()

    # Pages behind the last token are never read.
    lax.fori_loop(0, jnp.clip(held, 0, wide), one, None)


def _body(
  table: jax.Ref,
  lengths: jax.Ref,
  q_c: jax.Ref,
  q_r: jax.Ref,
  c: jax.Ref,
  k_r: jax.Ref,
  out: jax.Ref,
  latents: jax.Ref,
  ropes: jax.Ref,
  done: jax.Ref,
  turn: jax.Ref,
  *sums: jax.Ref,
  cut: _Cut,
) -> None:
  """Computes one request, all of its steps."""
  i, each = pl.program_id(1), pl.num_programs(1)
  b = pl.program_id(0) * each + i
  copies = _Copies(table, lengths, (c, k_r), (latents, ropes), done, cut)
  top, total, acc = sums
  top[...] = jnp.full(top.shape, _EMPTY, jnp.float32)
  total[...] = jnp.zeros(total.shape, jnp.float32)
  acc[...] = jnp.zeros(acc.shape, jnp.float32)

  @pl.when(i == 0)
  def _():
    turn[0] = 0
    copies.each('start', b, 0, 0)

  # Also without tokens: the next request's are copied meanwhile.
  steps = jnp.maximum(lax.div(lengths[b] + cut.tokens - 1, cut.tokens), 1)
  first = turn[0]

  def one(step: jax.Array, _: None) -> None:
    slot = lax.rem(first + step, 2)
    ends = step == steps - 1

    @pl.when(jnp.logical_not(ends) | (i + 1 < each))
    def _():
      after = jnp.where(ends, 0, step + 1)
      copies.each('start', jnp.where(ends, b + 1, b), after, 1 - slot)

    copies.each('wait', b, step, slot)

    @pl.when(ends)
    def _():
      # What lies behind the length is arbitrary, and 0 * nan is nan.
      keys = latents[slot]
      at = lax.broadcasted_iota(jnp.int32, (cut.tokens, 1), 0)
      behind = at >= lengths[b] - step * cut.tokens
      latents[slot] = jnp.where(behind, jnp.zeros_like(keys), keys)

    _add(q_c, q_r, latents[slot], ropes[slot], sums, lengths[b], step, cut)

  lax.fori_loop(0, steps, one, None)
  turn[0] = lax.rem(first + steps, 2)
  whole = total[...]
  out[...] = (acc[...] / jnp.where(whole > 0, whole, 1)).astype(out.dtype)


def _add(
  q_c: jax.Ref,
  q_r: jax.Ref,
  keys: jax.Array,
  shared: jax.Array,
  sums: tuple[jax.Ref, ...],
  length: jax.Array,
  step: jax.Array,
  cut: _Cut,
) -> None:
  """Adds a step's tokens, keys [W*S C] and shared [W*S R], to the sums."""
  top, total, acc = sums
  scores = _product(q_c[...], keys, (1, 1)) + _product(q_r[...], shared, (1, 1))
  rows, tokens = scores.shape
  at = step * tokens + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
  row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
  # Filled-up rows count as the last token's; their output is dropped.
  token = jnp.minimum(lax.div(row, cut.heads), cut.new - 1)
  seen = at < length - (cut.new - 1) + token
  scores = jnp.where(seen, scores * cut.scale, _EMPTY)
  highest = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
  weights = jnp.where(seen, jnp.exp(scores - highest), 0)
  kept = jnp.exp(top[...] - highest)
  top[...] = highest
  total[...] = total[...] * kept + weights.sum(axis=1, keepdims=True)
  mixed = _product(weights.astype(keys.dtype), keys, (1, 0))
  acc[...] = acc[...] * kept + mixed


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
