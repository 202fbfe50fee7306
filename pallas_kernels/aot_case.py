"""A function with the shapes that it is compiled for."""

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
  """A function of arrays with its (shape, dtype) arguments."""

  fn: Callable
  args: tuple
  wgmma: bool  # the kernel must contain tensor-core instructions
