"""Tiles, products and rings of stages that mla_prefill's kernels share.

Two warpgroups keep 64 rows each, past which blocks stream. What the second
product of a step takes goes there from registers. Of the blocks those that need
a mask come first. Forward a third warpgroup fetches, and the two take turns at
the tensor cores: while one multiplies, the other exponentiates
(FlashAttention-3, arXiv:2407.08608, section 3.1).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroups import wide

TILE, ROWS = 128, 64
WIDE, VALUE = 192, 128  # dims of queries and keys, of values
PART = 64  # columns of a swizzled tile
THREADS = 3
# Registers of a thread: two warpgroups and a frugal one share 65,536.
_OWN, _FETCHING = 240, 24
WGMMA = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
LOG2E = math.log2(math.e)


def memory(*shape: int) -> pl.MemoryRef:
  """Returns bfloat16 shared memory in tiles that wgmma reads."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=compat.TILED_16BIT)


def grid(q: jax.Array) -> dict[str, int]:
  """Returns the grid over batch, heads and tiles of 128 tokens."""
  return {'b': q.shape[0], 'h': q.shape[2], 'm': q.shape[1] // TILE}


def place(tiles: int) -> tuple[jax.Array, ...]:
  """Returns batch, head, tile and warpgroup; the longest tiles start first."""
  b, h, m, w = (lax.axis_index(a) for a in ('b', 'h', 'm', 'wg'))
  return b, h, tiles - 1 - m, w


class Walk(NamedTuple):
  """Says which blocks pass a tile, and which of them need a mask.

  Attributes:
    begin: number of the first block.
    cut: blocks before this one may be cut by a segment's border, and
    crossed: those from this one on, or by the diagonal.
    end: behind the last block.
  """

  begin: jax.Array
  cut: jax.Array
  crossed: jax.Array
  end: jax.Array

  def needs_mask(self, i: jax.Array) -> jax.Array:
    """Returns whether not every row attends to all of block i."""
    return (i < self.cut) | (i >= self.crossed)


def past_keys(starts: jax.Ref, b: jax.Array, m: jax.Array, size: int) -> Walk:
  """Returns the walk past blocks of `size` keys of tile m of batch b.

  Keys before the first query's segment are left out.
  """
  own = m * (TILE // size)
  begin = lax.div(starts[b, m * TILE], size)
  last = starts[b, m * TILE + TILE - 1]
  return Walk(begin, lax.div(last + size - 1, size), own, own + TILE // size)


def past_queries(ends: jax.Ref, b: jax.Array, m: jax.Array, size: int) -> Walk:
  """Returns the walk past blocks of `size` queries of the keys of tile m.

  Queries behind the last key's segment are left out.
  """
  own = m * (TILE // size)
  whole = lax.div(ends[b, m * TILE] + 1, size)
  end = lax.div(ends[b, m * TILE + TILE - 1], size) + 1
  return Walk(own, own + TILE // size, whole, end)


def masked(
  s: jax.Array, keys_from: jax.Array, rows_from: jax.Array, begin: jax.Array
) -> jax.Array:
  """Returns scores [64 keys] with -inf where a query doesn't attend to a key.

  Args:
    s: of queries from rows_from on and keys from keys_from on.
    keys_from, rows_from: positions in the sequence.
    begin: [64] where each query's segment begins.
  """
  key = iota(s.shape, 1, keys_from)
  seen = (key <= iota(s.shape, 0, rows_from)) & (key >= wide(begin, s.shape))
  return jnp.where(seen, s, -jnp.inf)


def fetch(
  walk: Walk, stages: int, streams: tuple[tuple[Callable, jax.Ref], ...]
) -> None:
  """Fills a ring of stages from the third warpgroup.

  Args:
    walk: the blocks.
    stages: of the ring.
    streams: pairs of load(block, stage), which starts the copies of a block,
      and the barrier of its stages that are free again.
  """

  @pl.when(lax.axis_index('wg') == 2)
  def _():
    compat.set_registers(_FETCHING, 'decrease')

    def one(i: jax.Array, _) -> tuple:
      stage = lax.rem(i, stages)
      for load, free in streams:

        @pl.when(i >= walk.begin + stages)
        def _(free: jax.Ref = free) -> None:
          plgpu.barrier_wait(free.at[stage])

        load(i, stage)
      return ()

    lax.fori_loop(walk.begin, walk.end, one, ())


def release(free: jax.Ref, i: jax.Array, walk: Walk, stages: int) -> None:
  """Says that this warpgroup has read block i, where one takes its stage."""

  @pl.when(i + stages < walk.end)
  def _():
    plgpu.barrier_arrive(free.at[lax.rem(i, stages)])


def compute(body: Callable[[Callable[[], None]], None], turn: jax.Ref) -> None:
  """Runs body(next_turn) in the first two warpgroups.

  Between two calls of next_turn a warpgroup either multiplies or does not, by
  turns, and first it does; both call it as often. The second one begins when
  the first one has called it once.
  """
  w = lax.axis_index('wg')

  def next_turn() -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  @pl.when(w < 2)
  def _():
    compat.set_registers(_OWN, 'increase')
    pl.when(w == 1)(next_turn)
    body(next_turn)


def stream(
  walk: Walk,
  stages: int,
  load: Callable,
  use: Callable,
  carry: Any,
  free: jax.Ref,
) -> Any:
  """Folds use(block, stage, carry) where two warpgroups are all there are.

  The first one also starts load(block, stage) of the blocks to come.
  """
  w = lax.axis_index('wg')

  # Load: all stages are on their way before the first step.
  @pl.when(w == 0)
  def _():
    def fill(i: jax.Array, _) -> tuple:
      load(i, lax.rem(i, stages))
      return ()

    until = jnp.minimum(walk.end, walk.begin + stages)
    lax.fori_loop(walk.begin, until, fill, ())

  def step(i: jax.Array, carry: Any) -> Any:
    stage = lax.rem(i, stages)
    carry = use(i, stage, carry)

    # Refill: once both warpgroups have read the stage.
    @pl.when(i + stages < walk.end)
    def _():
      plgpu.barrier_arrive(free.at[stage])

      @pl.when(w == 0)
      def _():
        plgpu.barrier_wait(free.at[stage])
        load(i + stages, stage)

    return carry

  return lax.fori_loop(walk.begin, walk.end, step, carry)


def product(a: jax.Ref, b: jax.Ref, columns: int) -> jax.Array:
  """Returns a @ b.T of refs, a float32 [64, columns] in registers."""

  def run(ref: jax.Ref) -> jax.Array:
    def part(i: jax.Array, _) -> tuple:
      inner = (slice(None), pl.ds(i * PART, PART))
      compat.wgmma(ref, a.at[inner], compat.transposed(b.at[inner]))
      return ()

    # In a loop: unrolled, the keys' kernel would spill.
    lax.fori_loop(0, a.shape[1] // PART, part, ())
    return ref[...]

  return pl.run_scoped(run, accumulator(columns))


def add_product(acc: jax.Array, a: jax.Ref, b: jax.Ref) -> jax.Array:
  """Returns acc + a @ b of refs."""

  def run(ref: jax.Ref) -> None:
    compat.wgmma(ref, a, b)
    plgpu.wgmma_wait(0)

  return compat.accumulate(acc, run)


def add_scores(ref: jax.Ref, a: list[jax.Ref], b: jax.Ref) -> None:
  """Starts ref += a @ b.T, a in parts of 64 columns."""
  for i, left in enumerate(a):
    columns = b.at[:, pl.ds(i * PART, PART)]
    compat.wgmma(ref, left, compat.transposed(columns))


def parts_of(ref: jax.Ref) -> list[jax.Ref]:
  """Returns a tile [64, 64 n] in parts of 64 columns."""
  count = ref.shape[1] // PART
  return [ref.at[:, pl.ds(i * PART, PART)] for i in range(count)]


def copy_parts(source: Callable, to: jax.Ref, here: jax.Ref) -> None:
  """Starts copies of source(columns) into the parts of `to`."""
  for i in range(to.shape[0]):
    plgpu.copy_gmem_to_smem(source(pl.ds(i * PART, PART)), to.at[i], here)


def store_parts(values: jax.Array, parts: jax.Ref, out: Callable) -> None:
  """Starts copies of [64, 64 n] values by shared memory to out(columns)."""
  count = values.shape[1] // PART
  for i in range(count):
    parts[i] = values[:, i * PART : (i + 1) * PART].astype(parts.dtype)
  plgpu.commit_smem()
  for i in range(count):
    plgpu.copy_smem_to_gmem(parts.at[i], out(pl.ds(i * PART, PART)))


def iota(
  shape: tuple[int, ...], axis: int, offset: int | jax.Array
) -> jax.Array:
  """Returns offset + the row (axis 0) or column (axis 1) of each entry."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) + offset


def zeros(columns: int) -> jax.Array:
  """Returns float32 zeros [64, columns]."""
  return compat.full((ROWS, columns), 0.0, WGMMA)


def accumulator(columns: int) -> Any:
  """Returns what run_scoped takes for a float32 sum [64, columns]."""
  return plgpu.ACC((ROWS, columns), jnp.float32)
