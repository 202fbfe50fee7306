"""Error, device time and share of the floor of one case of one operation."""

import collections
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_work import fresh_keys
from pallas_kernels import compat

ITERATIONS = 20


class InPlace:
  """A jitted function whose last argument is donated and then its result."""

  def __init__(self, fn, args):
    *self.args, last = args
    # Its own copy: the caller's is needed again.
    self.last = jax.tree.map(jnp.copy, last)
    self.fn = jax.jit(fn, donate_argnums=len(self.args))
    # By these the profiler takes it for a jitted function.
    for name in ('eval_shape', 'lower', 'trace'):
      setattr(self, name, getattr(self.fn, name))

  def compile(self):
    """Compiles what is called, and runs nothing."""
    self.fn = self.fn.lower(*self.args, self.last).compile()

  def __call__(self):
    self.last = self.fn(*self.args, self.last)
    return self.last


def _jitted(fn):
  """The function as one that compiles once."""
  once = isinstance(fn, (InPlace, jax.stages.Wrapped, jax.stages.Compiled))
  return fn if once else jax.jit(fn)


def cupti_us(fn, args) -> float:
  """Median microseconds of device time, without gaps between kernels."""
  from jax.experimental.mosaic.gpu import profiler

  # One at a time: measure keeps the results of all its iterations.
  times = [profiler.measure(fn)(*args)[1] for _ in range(ITERATIONS)]
  return 1e3 * statistics.median(times)


def parts_us(fn, args, most=16) -> dict[str, float]:
  """Microseconds of a call by the kernels' names, of those that take most."""
  from jax.experimental.mosaic.gpu import profiler

  found = collections.Counter()
  for name, ms in profiler.measure(fn, aggregate=False)(*args)[1]:
    found[name] += 1e3 * ms
  return {name: round(us, 1) for name, us in found.most_common(most)}


def wall_us(fn, args) -> float:
  """Microseconds of a call by the host's clock, over a batch of calls."""
  fn = _jitted(fn)
  jax.block_until_ready(fn(*args))
  start = time.perf_counter()
  for _ in range(ITERATIONS):
    out = fn(*args)
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / ITERATIONS * 1e6


def device_us(fn, args) -> tuple[float, str]:
  """Microseconds of a compiled call, and how they were measured."""
  fn = _jitted(fn)
  jax.block_until_ready(fn(*args))
  try:
    return cupti_us(fn, args), 'cupti'
  # A sandbox may refuse CUPTI; then gaps between kernels count, too.
  except Exception as error:
    reason = str(error) or repr(error)
    return wall_us(fn, args), f'wall clock: {reason.splitlines()[0][:60]}'


def floors() -> dict:
  """Rates of this device: FLOP/s of a matmul, bytes/s of the faster copy.

  On random numbers: of constants tensor cores multiply 12 % more in a second,
  for they need less power.
  """
  keys = fresh_keys(3)
  draw = lambda key, *size: jax.random.normal(key, size, jnp.bfloat16)
  pair = tuple(draw(key, 8192, 8192) for key in keys[:2])
  matmul, how = device_us(lambda a, b: a @ b, pair)
  big = draw(keys[2], 2**30)
  # Threads that load more at once may move more in a second.
  wide = jax.lax.bitcast_convert_type(big.reshape(-1, 2), jnp.float32)
  copy = min(device_us(lambda a: a + 1, (x,))[0] for x in (big, wide))
  return {
    'flops': 2 * 8192**3 / matmul * 1e6,
    'bytes': 2 * big.nbytes / copy * 1e6,
    'how': how,
  }


def checker(work) -> Callable[[], float]:
  """Compiles what gives the error of a case's kernel, see `worst_error`."""
  run = lambda *a: work.op(*a, impl='gpu')
  # The interpreter runs one kernel at a time; jit may start several.
  if not compat.is_interpreted():
    run = jax.jit(run).lower(*work.args).compile()
  exact = jax.jit(work.exact).lower(*work.args).compile()
  return lambda: worst_error(run(*work.args), exact(*work.args))


def worst_error(got, want) -> float:
  """The largest error over all arrays of both.

  Of numbers the largest difference over the largest of `want`, infinite where
  that is a number and the other is none. Of integers, which name things, the
  share that differs. Of float8, whose step is large, the share of codes that
  are a step apart, infinite where one is further away.
  """
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  worst = 0.0
  for g, w in pairs:
    g, w = np.asarray(g), np.asarray(w)
    if g.shape != w.shape:
      raise ValueError(f'the result is {list(g.shape)}, not {list(w.shape)}')
    error = 0.0 if not w.size else _error_of(g, w)
    # NaN passes no comparison, and max() of Python forgets it.
    if not np.isfinite(error):
      return float('inf')
    worst = max(worst, float(error))
  return worst


def _error_of(got: np.ndarray, want: np.ndarray) -> float:
  """The error of one array."""
  if jnp.issubdtype(want.dtype, jnp.integer) or want.dtype == bool:
    return (got != want).mean()
  if want.dtype == got.dtype == jnp.float8_e4m3fn:
    apart = np.abs(_codes(got) - _codes(want))
    return float('inf') if apart.max() > 1 else (apart > 0).mean()
  got, want = got.astype(np.float64), want.astype(np.float64)
  same = (got == want) | (np.isnan(got) & np.isnan(want))
  if not (np.isfinite(got) | same).all():
    return float('inf')
  apart = np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, want))
  size = np.abs(np.where(np.isfinite(want), want, 0.0)).max()
  return apart.max() / max(size, 1e-30)


def _codes(array: np.ndarray) -> np.ndarray:
  """The codes of float8 as integers in the order of their values."""
  codes = array.view(np.uint8).astype(int)
  return np.where(codes < 128, codes, 128 - codes)


def kernel_call(work, impl: str) -> tuple[Callable, tuple]:
  """Holds what to time of an implementation: a function, its arguments."""
  op = functools.partial(work.in_place or work.op, impl=impl)
  if work.in_place:
    return InPlace(op, work.args), ()
  return jax.jit(op), work.args


def prepared(work) -> tuple[Callable, tuple]:
  """The call of a case's kernel, compiled; nothing runs on the device yet.

  A model's is not compiled, for then XLA tries products out on the device.
  """
  fn, args = kernel_call(work, 'gpu')
  if work.tokens:
    return fn, args
  if isinstance(fn, InPlace):
    fn.compile()
    return fn, args
  return fn.lower(*args).compile(), args


def contenders(work) -> Iterator[tuple[str, Callable[[], float]]]:
  """Names, and calls that give microseconds."""
  if work.in_place:
    yield 'xla', lambda: device_us(*kernel_call(work, work.plain))[0]
  for name, fn in work.naive.items():
    yield name, lambda fn=fn: device_us(fn, work.args)[0]
  yield from work.libraries.items()


def floor_us(work, rates) -> float:
  """Microseconds that the work takes at least, at the rates of `floors`."""
  rate = rates['flops'] * work.speedup
  return 1e6 * max(work.flops / rate, work.moved / rates['bytes'])


def time_case(work, rates, names=None, call=None) -> Iterator[dict]:
  """The row of a case so far: with the kernel's time, then each contender's.

  Args:
    work: the case.
    rates: of `floors`.
    names: of the contenders that take part; None: all.
    call: of `prepared`, where it is there already.
  """
  call = call or kernel_call(work, 'gpu')
  us, how = device_us(*call)
  row = {
    'us': us,
    'tflops': work.flops / us * 1e-6,
    'tbytes': work.moved / us * 1e-6,
    'of_floor': floor_us(work, rates) / us,
    'how': how,
  }
  if work.tokens:
    # Gaps between kernels are a user's, too.
    row['tokens_per_second'] = work.tokens / wall_us(*call) * 1e6
  yield dict(row)
  notes = []
  if how == 'cupti':
    row['parts'] = parts_us(*call)
    yield dict(row)
  for name, call in contenders(work):
    if names is not None and name not in names:
      continue
    try:
      row[f'over_{name}'] = call() / us
    # Out of memory, or a library that is absent, of another version or not
    # for these shapes: no figure, but the reason.
    except Exception as error:
      reason = str(error) or repr(error)
      notes.append(f'{name}: {reason.splitlines()[0][:80]}')
      row['note'] = '; '.join(notes)
    yield dict(row)
