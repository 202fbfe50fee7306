"""Shapes that drive the tests and the benchmark of write_streams."""

from pallas_kernels.collapse_norm.shapes import BENCH, Shape

__all__ = ['BENCH', 'TEST']

TEST = {
  'four': Shape(5, 4, 1024),
  'two': Shape(3, 2, 512),
  'one_token': Shape(1, 3, 1536),
}
