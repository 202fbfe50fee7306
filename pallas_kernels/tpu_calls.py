"""Calls Pallas kernels for TPUs: guarded, or in the TPU interpreter on a CPU.

The interpreter simulates a TPU's memories and copies, with its race detector:
`with tpu_calls.interpreted(): ...`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import lowering_guard, target

SCALARS = 2**20  # bytes of scalar memory of a core
VECTORS = 2**24  # bytes of vector memory that a kernel gets by default


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Kernels traced inside run in the interpreter, races reported."""
  with target.interpreted_with(pltpu.InterpretParams(detect_races=True)):
    yield


def interpret() -> Any:
  """Returns what pallas_call's argument of that name is."""
  return target.interpreting() or False


def guarded(*args: jax.Array) -> tuple[jax.Array, ...]:
  """Returns arrays that are for a TPU alone, unless a kernel is interpreted."""
  return args if interpret() else lowering_guard.guarded(args, 'tpu')
