"""Latents into a paged cache on Hopper.

64 tokens a thread block. Warpgroup w multiplies them with columns
[256 w, 256 w + 256) of W_kva, and with the 64 rotary columns: warpgroup 0 with
those themselves, warpgroup 1 with each replaced by its signed partner, so that
rope is a sum of two products times cos and sin, for either pairing of channels.
The sums of squares and the rotary half cross over in shared memory, and each
row leaves for its own slot of the cache, which the kernel updates in place.

Few tokens don't fill the device: then W_kva is split along the model's width,
the parts are summed, and a second kernel does what follows the product.
Legend: N tokens (padded to tiles), D model, C latent, R rope dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.quantize import reference as quantize
from pallas_kernels.warpgroups import meet, wide

ROWS, STEP, STAGES = 64, 64, 2
LATENT, HALF, ROPE, GROUP = 512, 256, 64, 128
_TILE = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def latent_kv(
  x: jax.Array,
  w: jax.Array,
  gain: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  slots: jax.Array,
  cache: Any,
  eps: float,
  floor: float,
  interleaved: bool,
  splits: int | None,
) -> Any:
  """Returns the cache with the latents of x written at `slots`."""
  _supported(x, w, gain, cache)
  N, D = x.shape
  tiles = -(-N // ROWS)
  tall = lambda a, value=0: jnp.pad(
    a,
    ((0, tiles * ROWS - N),) + ((0, 0),) * (a.ndim - 1),
    constant_values=value,
  )
  flat = [a.reshape(-1, a.shape[-1]) for a in cache]
  # A token without a slot gets the one past the end, which nobody writes.
  slots = jnp.where(slots < 0, flat[0].shape[0], slots.astype(jnp.int32))
  rest = (
    gain.astype(jnp.float32),
    _table(tall(cos), tall(sin), interleaved),
    tall(slots, flat[0].shape[0]),
  )
  operands = (tall(x), w, _partners(w[:, LATENT:], interleaved))
  splits = splits or _pick_splits(tiles, D // STEP, compat.num_sms())
  if splits == 1:
    out = _write(_fused_body, _ring(), operands, rest, flat, eps, floor)
  else:
    parts = _product(operands, splits).sum(0)
    out = _write(_finish_body, {}, (parts,), rest, flat, eps, floor)
  return type(cache)(*(a.reshape(b.shape) for a, b in zip(out, cache)))


def _supported(x: jax.Array, w: jax.Array, gain: jax.Array, cache: Any) -> None:
  """Raises NotImplementedError unless the kernel can take dtypes and shapes."""
  kinds = [x.dtype, w.dtype, cache.k_r.dtype]
  if len(cache) == 2:
    kinds.append(cache.c.dtype)
  elif (cache.c.dtype, cache.scales.dtype) != (quantize.FP8, jnp.float32):
    raise NotImplementedError(
      f'cache of {cache.c.dtype} and {cache.scales.dtype}, not '
      'float8_e4m3fn and float32'
    )
  if any(kind != jnp.bfloat16 for kind in kinds):
    raise NotImplementedError(f'dtype {x.dtype}/{w.dtype}, not bfloat16')
  rope = w.shape[1] - gain.shape[0]
  if (gain.shape[0], rope) != (LATENT, ROPE):
    raise NotImplementedError(
      f'latent {gain.shape[0]} and rope {rope}, not 512 and 64'
    )
  if x.shape[1] % STEP:
    raise NotImplementedError(f'width {x.shape[1]}, not a multiple of {STEP}')


def _pick_splits(tiles: int, steps: int, sms: int) -> int:
  """Returns parts of the width: enough thread blocks, at least 8 steps each."""
  if 4 * tiles > sms:
    return 1
  return max(1, min(sms // tiles, steps // 8))


def _partners(w: jax.Array, interleaved: bool) -> jax.Array:
  """Returns w [D R] with each column replaced by what sin multiplies."""
  if interleaved:
    pairs = w.reshape(w.shape[0], -1, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(w.shape)
  a, b = jnp.split(w, 2, axis=1)
  return jnp.concatenate([-b, a], axis=1)


def _table(cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
  """Returns [2 N R] float32: what multiplies each column of both products."""
  wide = lambda a: (
    jnp.repeat(a, 2, axis=1) if interleaved else jnp.tile(a, (1, 2))
  )
  return jnp.stack([wide(cos), wide(sin)]).astype(jnp.float32)


def _ring() -> dict[str, Any]:
  """Returns tiles of the product: tokens, latent columns, rotary columns."""
  tile = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  return {
    'xs': tile(STAGES, ROWS, STEP),
    'ws': tile(STAGES, 2, STEP, HALF),
    'rs': tile(STAGES, 2, STEP, ROPE),
    'here': plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  }


def _multiply(
  x: jax.Ref, w: jax.Ref, partners: jax.Ref, xs: jax.Ref, ws: jax.Ref,
  rs: jax.Ref, here: jax.Ref, free: jax.Ref, *, tile: jax.Array,
  first: int | jax.Array, steps: int | jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Returns this warpgroup's [64 256] and [64 64] sums over `steps` steps."""
  g = lax.axis_index('wg')
  rows = pl.ds(tile * ROWS, ROWS)

  def load(step: jax.Array, stage: jax.Array) -> None:
    # Load: tokens once, and all columns that the two warpgroups need.
    inner = pl.ds((first + step) * STEP, STEP)
    copy = lambda source, to: plgpu.copy_gmem_to_smem(
      source, to, here.at[stage]
    )
    copy(x.at[rows, inner], xs.at[stage])
    for i in range(2):
      copy(w.at[inner, pl.ds(i * HALF, HALF)], ws.at[stage, i])
    copy(w.at[inner, pl.ds(LATENT, ROPE)], rs.at[stage, 0])
    copy(partners.at[inner], rs.at[stage, 1])

  # Load: all stages are on their way before the first product.
  @pl.when(g == 0)
  def _():
    def fill(stage: jax.Array, _) -> tuple:
      load(stage, stage)
      return ()

    lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, ())

  def run(latent: jax.Ref, rope: jax.Ref) -> tuple[jax.Array, jax.Array]:
    def step(k: jax.Array, _) -> tuple:
      stage = lax.rem(k, STAGES)
      # Wait, then matmul: latent and rotary columns by the same tokens.
      plgpu.barrier_wait(here.at[stage])
      compat.wgmma(latent, xs.at[stage], ws.at[stage, g])
      compat.wgmma(rope, xs.at[stage], rs.at[stage, g])
      plgpu.wgmma_wait(0)

      # Refill: once both warpgroups have read the stage.
      @pl.when(k + STAGES < steps)
      def _():
        plgpu.barrier_arrive(free.at[stage])

        @pl.when(g == 0)
        def _():
          plgpu.barrier_wait(free.at[stage])
          load(k + STAGES, stage)

      return ()

    lax.fori_loop(0, steps, step, ())
    return latent[...], rope[...]

  acc = lambda columns: plgpu.ACC((ROWS, columns), jnp.float32)
  return pl.run_scoped(run, acc(HALF), acc(ROPE))


def _product(operands: tuple[jax.Array, ...], splits: int) -> jax.Array:
  """Returns the products of every part of the width: [splits 2 N 256+64]."""
  x = operands[0]

  def body(
    x: jax.Ref, w: jax.Ref, partners: jax.Ref, out: jax.Ref, *ring: jax.Ref
  ) -> None:
    tile, split, g = (lax.axis_index(a) for a in ('tile', 'split', 'wg'))
    steps = x.shape[1] // STEP
    first = lax.div(split * steps, splits)
    last = lax.div((split + 1) * steps, splits)
    latent, rope = _multiply(
      x, w, partners, *ring, tile=tile, first=first, steps=last - first
    )
    # Store: float32 parts; they are summed outside, in a fixed order.
    rows = pl.ds(tile * ROWS, ROWS)
    out[split, g, rows, pl.ds(0, HALF)] = latent
    out[split, g, rows, pl.ds(HALF, ROPE)] = rope

  return compat.kernel(
    body,
    jax.ShapeDtypeStruct((splits, 2, x.shape[0], HALF + ROPE), jnp.float32),
    grid={'tile': x.shape[0] // ROWS, 'split': splits},
    threads=2,
    scratch=list(_ring().values()),
  )(*operands)


def _fused_body(
  x: jax.Ref, w: jax.Ref, partners: jax.Ref, *ring: jax.Ref, tile: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns this warpgroup's products, computed here."""
  steps = x.shape[1] // STEP
  return _multiply(x, w, partners, *ring, tile=tile, first=0, steps=steps)


def _finish_body(
  parts: jax.Ref, *, tile: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns this warpgroup's products, computed before."""
  g, rows = lax.axis_index('wg'), pl.ds(tile * ROWS, ROWS)
  read = lambda start, size: compat.load(
    parts, (g, rows, pl.ds(start, size)), _TILE, optimized=False
  )
  return read(0, HALF), read(HALF, ROPE)


def _write(
  products: Callable,
  ring: dict[str, Any],
  operands: tuple[jax.Array, ...],
  rest: tuple[jax.Array, ...],
  flat: list[jax.Array],
  eps: float,
  floor: float,
) -> list[jax.Array]:
  """Runs norm, rope and rounding, and returns the cache with the rows in it."""
  # As refs the caches are updated in place, if their buffers are donated.
  caches = [jax.new_ref(a) for a in flat]
  tiles = rest[-1].shape[0] // ROWS
  piece = GROUP if len(flat) == 3 else GROUP // 2
  scratch = {
    **ring,
    'stat': plgpu.SMEM((2, ROWS), jnp.float32),
    'turned': plgpu.SMEM((ROWS, ROPE), jnp.float32),
    'key': plgpu.SMEM((ROWS, ROPE), jnp.bfloat16),
    'staged': plgpu.SMEM((2, ROWS, piece), flat[0].dtype),
    'scale': plgpu.SMEM((2, ROWS), jnp.float32),
    'where': plgpu.SMEM((ROWS,), jnp.int32),
    'where_here': plgpu.Barrier(),
    'met': plgpu.Barrier(num_arrivals=2),
  }

  def body(*refs: jax.Ref) -> None:
    given, refs = refs[: len(operands)], refs[len(operands) :]
    rest, refs = refs[:3], refs[3:]
    caches, refs = refs[: len(flat)], refs[len(flat) :]
    tile = lax.axis_index('tile')
    store = dict(zip(scratch, refs, strict=True))
    latent, rope = products(*given, *(store[n] for n in ring), tile=tile)
    _store(latent, rope, *rest, caches, store, tile, eps, floor)

  compat.kernel_in_place(
    body, grid={'tile': tiles}, threads=2, scratch=list(scratch.values())
  )(*operands, *rest, *caches)
  return [jax.freeze(ref) for ref in caches]


def _store(
  latent: jax.Array,
  rope: jax.Array,
  gain: jax.Ref,
  table: jax.Ref,
  slots: jax.Ref,
  caches: tuple[jax.Ref, ...],
  store: dict[str, jax.Ref],
  tile: jax.Array,
  eps: float,
  floor: float,
) -> None:
  """Stores 64 tokens: norm and gain of the latent, rope of the key."""
  g, rows = lax.axis_index('wg'), pl.ds(tile * ROWS, ROWS)
  stat, turned, key, where = (
    store[n] for n in ('stat', 'turned', 'key', 'where')
  )

  # Load: the slots, on their way while the sums are exchanged.
  @pl.when(g == 0)
  def _():
    plgpu.copy_gmem_to_smem(slots.at[rows], where, store['where_here'])

  # Exchange: sums of squares both ways, the sine's half to warpgroup 0.
  own = (latent * latent).sum(axis=1)
  stat[g] = own
  factor = compat.load(table, (g, rows), _TILE, optimized=False)
  rope = rope * factor

  @pl.when(g == 1)
  def _():
    turned[...] = rope

  plgpu.barrier_wait(store['where_here'])
  meet(store['met'])
  # Norm: over both halves of the latent.
  square = own + compat.load(stat, 1 - g, _BY_ROW)
  norm = lax.rsqrt(square / LATENT + eps)

  # Rope: the products by cosine and by sine add up; rows to their slots.
  @pl.when(g == 0)
  def _():
    key[...] = (rope + compat.load(turned, slice(None), _TILE)).astype(
      key.dtype
    )
    plgpu.commit_smem()
    _scatter(key, caches[-1], slice(None), where)

  # Latent: gain, rounding and rows to their slots, piece by piece.
  width = store['staged'].shape[-1]
  for start in range(0, HALF, width):
    values = lax.slice(latent, (0, start), (ROWS, start + width))
    columns = pl.ds(pl.multiple_of(g * HALF + start, width), width)
    lift = compat.load(gain, columns, _BY_COLUMN, optimized=False)
    values = values * wide(norm, values.shape) * wide(lift, values.shape, 1)
    if start:
      plgpu.wait_smem_to_gmem(0)  # the last piece has been read
    if len(caches) == 3:
      amax = jnp.abs(values).max(axis=1)
      own, factor = quantize.scales_of(amax, False, floor)
      values = values * wide(factor, values.shape)
      store['scale'][g] = own
    staged = store['staged'].at[g]
    staged[...] = values.astype(staged.dtype)
    plgpu.commit_smem()
    _scatter(staged, caches[0], columns, where)
    if len(caches) == 3:
      number = g * (HALF // GROUP) + start // GROUP
      _scatter_numbers(store['scale'].at[g], caches[1], number, where)
  plgpu.wait_smem_to_gmem(0)


def _for_slots(
  pages: jax.Ref, where: jax.Ref, do: Callable[[jax.Array, jax.Array], None]
) -> None:
  """Calls do(row, slot) for each of the 64 tokens that has a slot."""

  def one(i: jax.Array, _) -> tuple:
    slot = where[i]
    pl.when(slot < pages.shape[0])(lambda: do(i, slot))
    return ()

  lax.fori_loop(0, ROWS, one, ())


def _scatter(
  staged: jax.Ref, pages: jax.Ref, columns: slice | pl.Slice, where: jax.Ref
) -> None:
  """Copies each row of staged [64 .] to its slot of pages, by TMA."""

  def copy(i: jax.Array, slot: jax.Array) -> None:
    plgpu.copy_smem_to_gmem(
      staged.at[pl.ds(i, 1)], pages.at[pl.ds(slot, 1), columns]
    )

  _for_slots(pages, where, copy)


def _scatter_numbers(
  staged: jax.Ref, pages: jax.Ref, column: int | jax.Array, where: jax.Ref
) -> None:
  """Stores each number of staged [64] to its slot of pages."""

  def copy(i: jax.Array, slot: jax.Array) -> None:
    pages[slot, column] = staged[i]

  _for_slots(pages, where, copy)
