"""One stage of benchmarks.kernels, in a process of its own.

  python -m benchmarks.kernel_stage '{"stage": "time", "op": ..., ...}'

Prints a row as JSON whenever it knows more; the last one counts. A crash, a
hang or a poisoned CUDA context costs this row alone.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax

from benchmarks import kernel_cases, kernel_timing


def device_row() -> dict:
  """Name of the device and of the software, and its rates."""
  return {'device': jax.devices()[0].device_kind, 'jax': jax.__version__}


def checked(op: str, shape: str) -> dict:
  """The error of a case, on fresh random numbers of a smaller shape."""
  return checker(op, shape)()


def checker(op: str, shape: str) -> Callable[[], dict]:
  """Compiles what gives the row of `checked`."""
  shapes, make, small = kernel_cases.OPS[op]
  work = make(small(shapes[shape]))
  error = kernel_timing.checker(work)
  return lambda: verdict(error(), work.tolerance)


def verdict(error: float, tolerance: float) -> dict:
  """The row of an error."""
  # JSON has no infinity.
  told = error if math.isfinite(error) else 'inf'
  row = {'error': told, 'tolerance': tolerance}
  if not error <= tolerance:
    row['failed'] = f'wrong: error {error:.3g} of {tolerance:.3g} at most'
  return row


def turn() -> None:
  """Says that all is compiled, and waits until the device is free."""
  print('{"ready": true}', flush=True)
  if not sys.stdin.readline():
    sys.exit('who gives the turns is gone')


def rows(asked: dict) -> Iterator[dict]:
  """The row of a stage, again and again as it grows."""
  stage, row = asked['stage'], {}
  if stage == 'floor':
    row = device_row()
    yield row
    yield row | kernel_timing.floors()
    return
  op, shape = asked['op'], asked['shape']
  if stage == 'check':
    yield checked(op, shape)
    return
  shapes, make, _ = kernel_cases.OPS[op]
  # What needs no device comes before the turn.
  check = None if asked['checked'] else checker(op, shape)
  work = make(shapes[shape])
  call = kernel_timing.prepared(work)
  turn()
  if check:
    row = check()
    yield row
  if 'failed' not in row:
    rates, names = asked['rates'], asked['contenders']
    for more in kernel_timing.time_case(work, rates, names, call):
      yield row | more


def main(argument: str) -> int:
  asked, start, row = json.loads(argument), time.perf_counter(), {}
  who = {key: asked[key] for key in ('op', 'shape') if key in asked}
  say = lambda row: print(json.dumps(who | row), flush=True)
  if jax.default_backend() != 'gpu':
    say({'failed': f'no GPU here, but {jax.default_backend()}'})
    return 2
  try:
    for found in rows(asked):
      row = found
      say(row)
  # Mosaic raises ValueError, AssertionError and others for what it can't lower.
  except Exception as error:
    text = ' '.join((str(error) or repr(error)).split())
    row = row | {'failed': f'{type(error).__name__}: {text[:300]}'}
  say(row | {'seconds': round(time.perf_counter() - start, 1)})
  return 1 if 'failed' in row else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1]))
