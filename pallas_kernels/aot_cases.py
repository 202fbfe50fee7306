"""The kernels and shapes that are compiled ahead of time and exported."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.mla_decode import mla_decode


class Case(NamedTuple):
  """A function of arrays with its (shape, dtype) arguments."""

  fn: Callable
  args: tuple
  wgmma: bool  # the kernel must contain tensor-core instructions


def _mla_decode(batch, new, heads, splits):
  bf, i32 = jnp.bfloat16, jnp.int32
  args = (
    ((batch, new, heads, 512), bf),
    ((batch, new, heads, 64), bf),
    ((batch * 64, 64, 512), bf),
    ((batch * 64, 64, 64), bf),
    ((batch, 64), i32),
    ((batch,), i32),
  )
  fn = functools.partial(mla_decode, scale=0.07, splits=splits, impl='gpu')
  return Case(fn, args, True)


CASES = {
  'mla_decode_h128': _mla_decode(128, 1, 128, 1),
  'mla_decode_h128_s2_split4': _mla_decode(4, 2, 128, 4),
  'mla_decode_h16': _mla_decode(128, 1, 16, 1),
}
