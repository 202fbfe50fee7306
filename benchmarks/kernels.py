"""Every kernel over its shape table on one GPU: error, time, share of floor.

  python -m benchmarks.kernels [--only=OP] [--out=benchmarks/results]

Times are medians of device time (CUPTI) without gaps between kernels; a library
of torch is timed by CUDA events. What fills a cache gets it donated. The floor
is the larger of useful FLOPs over the rate of a large bfloat16 matmul and bytes
over the rate of a large copy, both measured in the same run. Errors are against
float32 on fresh random inputs of a smaller shape. Without a GPU it says so and
exits 2; --interpret then runs the small shapes in the interpreter to test
itself, and times nothing.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_cases
from pallas_kernels import compat

_COLUMNS = (
  ('op', 'op'),
  ('shape', 'shape'),
  ('error', 'error'),
  ('us', 'us'),
  ('tflops', 'TFLOP/s'),
  ('tbytes', 'TB/s'),
  ('of_floor', 'floor/time'),
  ('over_xla', 'XLA/time'),
  ('over_cudnn', 'cuDNN/time'),
  ('over_torch', 'torch/time'),
  ('over_flash_mla', 'FlashMLA/time'),
  ('over_triton', 'Triton/time'),
  ('note', 'note'),
)


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

  def __call__(self):
    self.last = self.fn(*self.args, self.last)
    return self.last


def device_us(fn, args, iterations=20) -> float:
  """Median microseconds of device time of a compiled call."""
  from jax.experimental.mosaic.gpu import profiler

  fn = fn if isinstance(fn, InPlace) else jax.jit(fn)
  jax.block_until_ready(fn(*args))
  # One at a time: measure keeps the results of all its iterations.
  times = [profiler.measure(fn)(*args)[1] for _ in range(iterations)]
  return 1e3 * statistics.median(times)


def floors() -> dict[str, float]:
  """Rates of this device: FLOP/s of a matmul, bytes/s of a copy."""
  x = jnp.ones((8192, 8192), jnp.bfloat16)
  matmul = device_us(lambda a, b: a @ b, (x, x)) * 1e-6
  big = jnp.ones(2**31, jnp.bfloat16)
  copy = device_us(lambda a: a + 1, (big,)) * 1e-6
  return {'flops': 2 * 8192**3 / matmul, 'bytes': 2 * big.nbytes / copy}


def relative_error(work) -> float:
  """Largest error of any output over the largest exact value of it."""
  run = lambda *a: work.op(*a, impl='gpu')
  # The interpreter runs one kernel at a time; jit may start several.
  run = run if compat.is_interpreted() else jax.jit(run)
  got = run(*work.args)
  want = jax.jit(work.exact)(*work.args)
  worst = 0.0
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    worst = max(worst, np.abs(g - w).max() / max(np.abs(w).max(), 1e-30))
  return float(worst)


def case_us(work, impl: str) -> float:
  op = functools.partial(work.in_place or work.op, impl=impl)
  if work.in_place:
    return device_us(InPlace(op, work.args), ())
  return device_us(op, work.args)


def contenders(work) -> Iterator[tuple[str, Callable[[], float]]]:
  """Names, and calls that give microseconds."""
  if work.in_place:
    yield 'xla', lambda: case_us(work, 'reference')
  for name, fn in work.naive.items():
    yield name, lambda fn=fn: device_us(fn, work.args)
  yield from work.libraries.items()


def time_case(work, rates) -> dict:
  us = case_us(work, 'gpu')
  floor = 1e6 * max(work.flops / rates['flops'], work.moved / rates['bytes'])
  row = {
    'us': us,
    'tflops': work.flops / us * 1e-6,
    'tbytes': work.moved / us * 1e-6,
    'of_floor': floor / us,
  }
  notes = []
  for name, call in contenders(work):
    try:
      row[f'over_{name}'] = call() / us
    # Out of memory, or a library that is absent, of another version or not
    # for these shapes: no figure, but the reason.
    except Exception as error:
      reason = str(error) or repr(error)
      notes.append(f'{name}: {reason.splitlines()[0][:80]}')
  return row | ({'note': '; '.join(notes)} if notes else {})


def run(only: str, interpret: bool) -> Iterator[dict]:
  """The report so far, after every case: one that fails costs itself alone."""
  device = jax.devices()[0]
  report = {
    'device': device.device_kind,
    'jax': jax.__version__,
    'date': datetime.date.today().isoformat(),
    'floors': {} if interpret else floors(),
    'rows': [],
  }
  for op, (shapes, make, small) in kernel_cases.OPS.items():
    if not op.startswith(only):
      continue
    for name, shape in shapes.items():
      row = {'op': op, 'shape': name}
      report['rows'].append(row)
      try:
        row['error'] = relative_error(make(small(shape)))
        if not interpret:
          row |= time_case(make(shape), report['floors'])
      except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        row['note'] = str(error).splitlines()[0][:60]
      print(json.dumps(row), flush=True)
      yield report
      if interpret:
        break  # one shape is enough to test the runner


def table(report: dict) -> str:
  def cell(value):
    return f'{value:.3g}' if isinstance(value, float) else str(value)

  lines = [
    f'{report["device"]}, jax {report["jax"]}, {report["date"]}; floors: '
    + ', '.join(f'{v:.3g} {k}/s' for k, v in report['floors'].items()),
    '',
    '| ' + ' | '.join(title for _, title in _COLUMNS) + ' |',
    '|' + '---|' * len(_COLUMNS),
  ]
  for row in report['rows']:
    cells = [cell(row.get(key, '')) for key, _ in _COLUMNS]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def main(argv) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help='prefix of the ops')
  parser.add_argument('--out', default='benchmarks/results')
  parser.add_argument('--interpret', action='store_true')
  flags = parser.parse_args(argv)
  if flags.interpret:
    with compat.interpreted():
      *_, report = run(flags.only, True)
    print(table(report))
    return 0
  if jax.default_backend() != 'gpu':
    print('benchmarks.kernels: no GPU here, nothing to time', file=sys.stderr)
    return 2
  out = pathlib.Path(flags.out)
  out.mkdir(parents=True, exist_ok=True)
  for report in run(flags.only, False):
    stem = f'kernels-{report["device"].replace(" ", "-")}-{report["jax"]}'
    (out / f'{stem}.json').write_text(json.dumps(report, indent=1) + '\n')
    (out / f'{stem}.md').write_text(table(report))
  print(table(report))
  return 1 if any('us' not in row for row in report['rows']) else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
