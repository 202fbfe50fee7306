"""Shapes that drive the tests and the benchmark of mla_prefill."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: lengths of the packed segments of each row, H heads."""

  segments: tuple[tuple[int, ...], ...]
  heads: int


TEST = {
  'one_token': Shape(((1,),), 1),
  'one_segment': Shape(((13,),), 2),
  'ragged': Shape(((3, 1, 7), (11,)), 2),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'short': Shape(((5,),), 1),
  'ragged': Shape(((70, 1, 129), (200,)), 1),
  # More blocks than stages; with and without ones that need no mask.
  'long': Shape(((640,), (100, 400, 140)), 1),
}

BENCH = {
  's4096_h128': Shape(((4096,),), 128),
  's8192_h128': Shape(((8192,),), 128),
  's8192_h128_packed': Shape(((1024, 3072, 96, 4000),), 128),
}
