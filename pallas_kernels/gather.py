"""Gathers rows of global memory into the tiles that wgmma reads, on Hopper.

Its TMA fetches boxes, not lists of rows, so each thread of a warpgroup asks for
16 bytes at a time by cp.async and puts them where the swizzle wants them. Rows
are on their way between `start`, closed by `commit`, and `wait`, after which
plgpu.commit_smem and a barrier show them to the readers. The interpreter, which
knows no cp.async, gets the same rows by a plain load and store.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels import compat

ROWS, COLUMNS = 8, 32  # of a tile: 64 bytes, swizzled
TILE = (plgpu.TilingTransform((ROWS, COLUMNS)), plgpu.SwizzleTransform(64))
_THREADS, _VECTOR = 128, 8  # columns of one copy
_AT_ONCE = 64  # columns that neighbouring threads copy together


def start(
  source: jax.Ref, chosen: jax.Ref, dest: jax.Ref, run: int = 1
) -> None:
  """Starts dest[r i + j] = source[chosen[i] + j] for j < r, a run of rows.

  Zeros stand where chosen is negative.

  Args:
    source: [M C] bfloat16 in global memory; C is a multiple of 64, or 32.
    chosen: [N / r] int32 in global memory; N is a multiple of 32.
    dest: [N C] in shared memory, tiled by `TILE`.
    run: r.
  """
  if compat.is_interpreted():
    # The same rows by a plain load: no copy is on its way afterwards.
    at = chosen[...][:, None]
    at = jnp.where(at >= 0, at + jnp.arange(run, dtype=jnp.int32), -1)
    at = at.reshape(-1)
    rows = jnp.take(source[...], jnp.maximum(at, 0), axis=0)
    dest[...] = jnp.where((at >= 0)[:, None], rows, jnp.zeros_like(rows))
    return
  plain = plgpu.RefType()
  copy = functools.partial(_copy, run=run)
  plgpu.inline_mgpu(arg_types=(plain, plain, plgpu.RefType(TILE)))(copy)(
    source, chosen, dest
  )


def commit() -> None:
  """Closes a group of `start`s, which may be empty."""
  if not compat.is_interpreted():
    plgpu.inline_mgpu()(lambda _: nvvm.cp_async_commit_group() and None)()


def wait(groups: int) -> None:
  """Waits for all but the last so many groups of this warpgroup."""
  if not compat.is_interpreted():
    plgpu.inline_mgpu()(lambda _: nvvm.cp_async_wait_group(groups) and None)()


def places(thread: Any, rows: int, columns: int) -> Iterator[tuple]:
  """Yields what a thread copies: (row, [(column, tile, inside the tile)]).

  Up to eight threads share a row and fetch 128 bytes of it. The swizzle
  exchanges the 16-byte pieces of a tile's row by bits 7 and up of the address,
  which are the row's number over two.
  """
  lanes = min(columns, _AT_ONCE) // _VECTOR
  row, lane = thread // lanes, thread % lanes
  r = row % ROWS
  piece = (lane % 4) ^ (r // 2)
  for top in range(0, rows, _THREADS // lanes):
    yield (
      row + top,
      [
        (
          lane * _VECTOR + left,
          (row // ROWS + top // ROWS, lane // 4 + left // COLUMNS),
          r * COLUMNS + piece * _VECTOR,
        )
        for left in range(0, columns, _AT_ONCE)
      ],
    )


def _copy(_, source: Any, chosen: Any, dest: Any, *, run: int) -> None:
  """Emits `start` for one thread of the warpgroup."""
  i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  kind = ir.BF16Type.get()
  outer = llvm.PointerType.get(address_space=1)
  pointer = lambda ref: llvm.addrspacecast(outer, mgpu.utils.memref_ptr(ref))
  offset = lambda value: value.registers.item()
  step = mgpu.utils.getelementptr
  (stride, _), _ = ir.MemRefType(source.type).get_strides_and_offset()
  tiles = ir.MemRefType(dest.type)
  (down, right, *_), _ = tiles.get_strides_and_offset()
  size = [n * m for n, m in zip(tiles.shape[:2], tiles.shape[2:])]
  from_, list_ = pointer(source), pointer(chosen)
  to = mgpu.utils.memref_ptr(dest)
  thread = mgpu.FragmentedArray.splat(
    mgpu.utils.thread_idx(), (), is_signed=False
  )
  nothing = arith.constant(i32, 0)
  full = arith.constant(i32, 2 * _VECTOR)
  # Load: 16 bytes a copy, neighbouring threads in neighbouring columns.
  work = list(places(thread % _THREADS, *size))
  # All of the list before any row, or each row would wait for its number.
  at = [
    llvm.load(i32, step(list_, [offset(row // run)], i32)) for row, _ in work
  ]
  for number, (row, copies) in zip(at, work, strict=True):
    # Row 0 stands in for no row: an address has to be valid.
    here = arith.cmpi(arith.CmpIPredicate.sge, number, nothing)
    number = arith.select(here, number, nothing)
    if run > 1:
      number = arith.addi(number, offset(row % run))
    begin = arith.muli(arith.extui(i64, number), arith.constant(i64, stride))
    begin = step(from_, [begin], kind)
    for column, (i, j), inside in copies:
      # A copy of no bytes fills all 16 with zeros.
      nvvm.cp_async_shared_global(
        step(to, [offset(i * down + j * right + inside)], kind),
        step(begin, [offset(column)], kind),
        2 * _VECTOR,
        nvvm.LoadCacheModifierKind.CG,
        cp_size=arith.select(here, full, nothing),
      )
