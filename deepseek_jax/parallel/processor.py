"""Knows the CPU: its kind, and which options XLA's programs gain from there.

What gains was measured once and stands in a table: nothing is timed when a run
starts, so two runs on processors of one kind compile the same programs.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from deepseek_jax import say

Program = Literal['init', 'train', 'prefill', 'decode']
# A vendor's processors by their best unit for matrices, best first.
_UNITS = {
  'GenuineIntel': (('amx_bf16', 'Intel AMX'), ('avx512f', 'Intel AVX-512')),
  'AuthenticAMD': (('avx512f', 'AMD AVX-512'), ('avx2', 'AMD AVX2')),
}
# Without XLA's fusions into YNNPACK a training step took 3.1 s for 3.4 (jax
# 0.10.2) and 2.65 for 2.9 (0.12), a prefill of 8 x 512 tokens 0.75 for 1.0 and
# 0.77 for 0.85 on a Sapphire Rapids. Decoding in batches needs them.
_NO_YNN = {'xla_cpu_experimental_ynn_fusion_type': ''}
# Drawing weights runs once: with fewer of LLVM's passes the program of 33.7M
# parameters is compiled in 8 s instead of 14 (of an AMD EPYC's core), and draws
# the same bits. In an order that keeps few numbers at a time it holds 36 MiB
# beside its 128 MiB of weights, for 148 (a training step 1,264 for 1,473, but
# it takes 4 % longer, and prefill 5 %).
_ONCE = {
  'xla_backend_optimization_level': '1',
  'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
}
_GAINS: dict[tuple[str, Program], dict[str, str]] = {
  ('Intel AMX', 'train'): _NO_YNN,
  ('Intel AMX', 'prefill'): _NO_YNN,
  ('Intel AVX-512', 'train'): _NO_YNN,
  ('Intel AVX-512', 'prefill'): _NO_YNN,
}


class Processor(NamedTuple):
  """Holds what an operating system tells of its CPU."""

  vendor: str
  flags: frozenset[str]

  @property
  def kind(self) -> str:
    """Returns vendor and best unit, 'Intel AMX'; '' if it is not known."""
    units = _UNITS.get(self.vendor, ())
    return next((kind for flag, kind in units if flag in self.flags), '')

  @property
  def multiplies_bfloat16(self) -> bool:
    """Returns whether it multiplies bfloat16 faster than float32."""
    return 'amx_bf16' in self.flags


def read(path: str | Path = '/proc/cpuinfo') -> Processor:
  """Returns the CPU that Linux describes in a file; others tell nothing."""
  try:
    lines = Path(path).read_text('utf-8', 'replace').splitlines()
  except OSError:
    return Processor('', frozenset())
  # Of the first core: a program runs on all of them.
  pairs = [line.partition(':') for line in reversed(lines) if ':' in line]
  fields = {key.strip(): value.strip() for key, _, value in pairs}
  flags = fields.get('flags', '').split()
  return Processor(fields.get('vendor_id', ''), frozenset(flags))


@functools.cache
def this() -> Processor:
  """Returns the CPU of this machine."""
  return read()


def options(
  program: Program, chosen: tuple[tuple[str, str], ...] | None = None
) -> dict[str, str]:
  """Returns XLA's options for a program, as jax.jit's compiler_options.

  Args:
    program: what it does; 'init' draws weights, 'train' is a step or a
      held-out loss.
    chosen: pairs of names and values for training and prefill to take instead;
      None: the table's for this CPU.

  A version of XLA that knows no such option goes without it, and says so. What
  the user's XLA_FLAGS name is the user's.
  """
  gains = {}
  if chosen is not None and program in ('train', 'prefill'):
    gains = dict(chosen)
  elif jax.default_backend() == 'cpu':
    once = _ONCE if program == 'init' else {}
    gains = _GAINS.get((this().kind, program), once)
  flags = os.environ.get('XLA_FLAGS', '')
  mine = {name: value for name, value in gains.items() if name not in flags}
  return {name: value for name, value in mine.items() if known(name, value)}


@functools.cache
def known(name: str, value: str) -> bool:
  """Returns whether the XLA at hand takes an option: it compiles a constant."""
  try:
    jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    why = str(error).partition('\n')[0]
    say.warn(
      f'compute.xla: XLA of jax {jax.__version__} refuses {name}={value!r}, and'
      f' programs go without it ({why})'
    )
    return False
  return True


def dtype() -> str:
  """Returns what this machine multiplies fastest: 'bfloat16' or 'float32'."""
  accelerated = jax.default_backend() != 'cpu' or this().multiplies_bfloat16
  return 'bfloat16' if accelerated else 'float32'


def described(options: Mapping[str, str], compute: str) -> str:
  """Returns a line: what computes, the dtype of products, XLA's options."""
  device = jax.local_devices()[0]
  of_cpu = this().kind or 'of no known kind'
  kind = of_cpu if device.platform == 'cpu' else device.device_kind
  pairs = [f'{name}={value}' for name, value in options.items()]
  return (
    f'{kind}; products in {compute}; XLA options {", ".join(pairs) or "none"}'
  )
