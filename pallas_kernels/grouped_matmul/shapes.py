"""Shapes that drive the tests and the benchmark of grouped_matmul."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: rows that each expert has, D and F, rows per block."""

  counts: tuple[int, ...]
  dim: int
  out: int
  block: int


TEST = {
  'ragged': Shape((5, 0, 17, 8), 12, 20, 8),
  'last_empty': Shape((3, 9, 0), 16, 8, 4),
  'one_row': Shape((0, 1, 0), 8, 16, 4),
  'one_expert': Shape((40,), 8, 24, 8),
  'decode': Shape((1, 0, 0, 2, 0, 1), 16, 24, 1),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'rows_128': Shape((130, 0, 5), 128, 256, 128),
  'rows_64': Shape((0, 3, 64), 256, 128, 64),
  'more_steps_than_stages': Shape((1,), 384, 128, 64),
}

# The (n, k) of DeepSeek-V3 experts; groups from training down to decoding.
BENCH = {
  'g8_m4096_up': Shape((4096,) * 8, 7168, 4096, 128),
  'g8_m4096_down': Shape((4096,) * 8, 2048, 7168, 128),
  'g32_m1024_up': Shape((1024,) * 32, 7168, 4096, 128),
  'g256_m128_up': Shape((128,) * 256, 7168, 4096, 128),
  'g256_m64_up': Shape((64,) * 256, 7168, 4096, 64),
  'g256_m64_down': Shape((64,) * 256, 2048, 7168, 64),
}

# Widths in 128 as float8 needs them; the kernels take these too.
TEST_WIDE = {
  'rows_128': Shape((130, 0, 5), 256, 256, 128),
  'rows_64': Shape((0, 3, 64), 640, 128, 64),
}
