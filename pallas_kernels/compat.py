"""Spells Pallas Mosaic GPU the same way for jax 0.10.2 to 0.12.0.1.

Also the switch that runs kernels in the Mosaic interpreter (with its race
detector) instead of on a GPU: `with compat.interpreted(): ...`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import lowering_guard, target

BEFORE_0_11 = jax.__version_info__ < (0, 11)
BEFORE_0_12 = jax.__version_info__ < (0, 12)
# Since 0.12 kernels are compiled to be linked, for which ptxas ignores
# setmaxnreg (C7504).
REGISTERS_MOVE = BEFORE_0_12

SHARED_MEMORY = 232_448  # bytes of a thread block on Hopper
# Layout of wgmma operands in shared memory: 8 rows by 128 bytes, swizzled.
TILED_16BIT = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
TILED_8BIT = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))


def _interpret_params() -> Any:
  """Returns the interpreter's settings, under this version's name."""
  # Public since 0.11.
  if BEFORE_0_11:
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams(detect_races=True)
  return plgpu.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Kernels traced inside run in the interpreter, races reported."""
  with target.interpreted_with(_interpret_params()):
    yield


def is_interpreted() -> bool:
  """Returns whether kernels run in the interpreter."""
  return target.interpreting() is not None


def _check_room(threads: int) -> None:
  """Raises RuntimeError where warpgroups would wait for each other for ever."""
  room = int(os.environ.get('NPROC') or os.cpu_count() or 1)
  if is_interpreted() and threads > room:
    raise RuntimeError(
      f'the interpreter runs {threads} warpgroups in as many threads, and XLA'
      f' has {room}: set NPROC=8 before jax starts'
    )


def _several(threads: int) -> dict[str, Any]:
  """Returns the arguments that ask for more than one warpgroup."""
  return {'num_threads': threads, 'thread_name': 'wg'} if threads > 1 else {}


def _warpgroup_params(**more: Any) -> plgpu.CompilerParams:
  """Returns compiler parameters for warpgroup semantics."""
  return plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    **more,
  )


def _guarded(call: Callable) -> Callable:
  """Returns the call; one for a device refuses all platforms but CUDA."""
  if is_interpreted():
    return call
  return lambda *args: call(*lowering_guard.guarded(args))


def _named(body: Callable) -> Callable:
  """Returns the body under the name that profilers show: quantize_rows."""
  inner = body
  while isinstance(inner, functools.partial):
    inner = inner.func
  where = inner.__module__.removeprefix('pallas_kernels.').split('.')
  what = inner.__qualname__.partition('.')[0].strip('_').removesuffix('body')
  parts = [part for part in where if part != 'gpu'] + [what.strip('_')]

  def run(*refs: jax.Ref, **scratch: jax.Ref) -> None:
    body(*refs, **scratch)

  run.__name__ = run.__qualname__ = '_'.join(filter(None, parts))
  return run


def kernel(
  body: Callable,
  out: Any,
  *,
  grid: dict[str, int],
  scratch: Any = (),
  threads: int = 1,
  across_warps: bool = True,
) -> Callable:
  """Wraps plgpu.kernel with warpgroup semantics; grid is {axis name: size}.

  With `threads` > 1 the body runs in that many warpgroups, on the axis 'wg'.
  Without `across_warps` it sums and compares along rows of wgmma's layout only,
  which needs none of the 2 KiB that are set aside otherwise.
  """
  _check_room(threads)
  # 2 KiB per thread block, which kernels at the limit don't have.
  room = {} if across_warps else {'reduction_scratch_bytes': 0}
  call = plgpu.kernel(
    _named(body),
    out_type=out,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    interpret=target.interpreting(),
    compiler_params=_warpgroup_params(**room),
    **_several(threads),
  )
  return _guarded(call)


def kernel_in_place(
  body: Callable, *, grid: dict[str, int], scratch: list, threads: int
) -> Callable:
  """Wraps `kernel` for refs of jax.new_ref, which are its only results.

  plgpu.kernel of jax 0.10 loses track of such refs in its rule for vmap.
  """
  mesh = plgpu.Mesh(
    grid=tuple(grid.values()), grid_names=tuple(grid), **_several(threads)
  )
  axes = 'wg' if threads > 1 else ()

  def scoped(*refs: jax.Ref) -> None:
    fn = functools.partial(body, *refs)
    pl.run_scoped(fn, *scratch, collective_axes=axes)

  scoped.__name__ = scoped.__qualname__ = _named(body).__name__
  call = pl.kernel(
    scoped,
    out_type=(),
    mesh=mesh,
    compiler_params=_warpgroup_params(),
    interpret=target.interpreting() or False,  # None is not taken here
  )
  return _guarded(call)


def transposed(ref: jax.Ref) -> jax.Ref:
  """Returns the [n m] view of an [m n] ref in shared memory."""
  if BEFORE_0_11:
    return plgpu.transpose_ref(ref, (1, 0))
  return ref.transpose((1, 0))


def load(
  ref: jax.Ref, index: Any, layout: Any, *, optimized: bool = True
) -> jax.Array:
  """Loads ref[index] to registers; global memory needs optimized=False."""
  index = index if isinstance(index, tuple) else (index,)
  if BEFORE_0_11:
    return plgpu.load(ref, index, layout=layout, optimized=optimized)
  return plgpu.load(ref.at[index], layout=layout, optimized=optimized)


def store(ref: jax.Ref, index: tuple, value: jax.Array) -> None:
  """Stores value to ref[index] in global memory, in pieces of any size."""
  if BEFORE_0_12:
    ref[index] = value
  else:
    plgpu.store(ref.at[index], value, optimized=False)


def full(
  shape: tuple[int, ...],
  value: float,
  layout: Any,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Returns an array of one value in the given layout of registers."""
  return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def sqrt(x: jax.Array) -> jax.Array:
  """Returns the root of x >= 0; jax 0.10 has rsqrt alone (nan for inf)."""
  if BEFORE_0_11:
    return x * jax.lax.rsqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
  return jnp.sqrt(x)


def wgmma(acc: jax.Ref, a: jax.Ref, b: jax.Ref) -> None:
  """Adds a @ b of refs in shared memory to the accumulator."""
  if is_interpreted():
    # Its race detector overlooks what wgmma reads, but not a load. A load,
    # unlike wgmma, needs the fence before a copy to the same place.
    for ref in (a, b):
      _ = ref[...]
    plgpu.commit_smem()
  plgpu.wgmma(acc, a, b)


def accumulate(acc: jax.Array, fn: Callable[[jax.Ref], None]) -> jax.Array:
  """Runs fn(ref) on an accumulator that starts as `acc`; returns it."""
  if not is_interpreted():
    return pl.run_state(fn)(plgpu.ACC.init(acc))

  # The interpreter has no rule for run_state: the same sum in two parts.
  def from_zero(ref: jax.Ref) -> jax.Array:
    fn(ref)
    return ref[...]

  return acc + pl.run_scoped(from_zero, plgpu.ACC(acc.shape, jnp.float32))


def add_product(
  acc: jax.Array,
  a: jax.Array,
  b: jax.Ref,
  meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
  """Returns acc + a @ b of an array in registers and a ref.

  `meanwhile` is called when the product has started.
  """
  if is_interpreted():
    meanwhile()
    # Its wgmma takes refs alone.
    right = b[...]
    plgpu.commit_smem()  # as in `wgmma`
    return acc + jnp.dot(a, right, preferred_element_type=jnp.float32)

  def run(ref: jax.Ref) -> None:
    plgpu.wgmma(ref, a, b)
    meanwhile()
    plgpu.wgmma_wait(0)

  return accumulate(acc, run)


def set_registers(count: int, action: str) -> None:
  """Changes how many registers a thread of this warpgroup may use.

  Where they don't move, each of 384 threads has 168.
  """
  if REGISTERS_MOVE and not is_interpreted():
    plgpu.set_max_registers(count, action=action)


def num_sms() -> int:
  """Returns multiprocessors of the target, also compiling without a device."""
  return target.current().cores
