"""Shapes that drive the tests and the benchmark of latent_kv."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: N tokens, D model, pages of G tokens, kind of cache."""

  tokens: int
  dim: int
  pages: int
  page: int
  fp8: bool = False
  interleaved: bool = True
  splits: int | None = None


TEST = {
  'one_token': Shape(1, 24, 2, 4),
  'ragged': Shape(13, 16, 5, 4, interleaved=False),
  'fp8': Shape(7, 24, 4, 8, True),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'fused': Shape(70, 192, 3, 64, splits=1),
  'fused_fp8': Shape(65, 128, 2, 64, True, False, splits=1),
  'split': Shape(5, 256, 1, 64, splits=2),
  'split_fp8': Shape(3, 192, 1, 64, True, splits=2),
}

# DeepSeek-V3 writes 576 numbers a token and layer.
BENCH = {
  'prefill_t8192': Shape(8192, 7168, 128, 64),
  'prefill_t8192_fp8': Shape(8192, 7168, 128, 64, True),
  'decode_b128': Shape(128, 7168, 8192, 64),
  'decode_b128_fp8': Shape(128, 7168, 8192, 64, True),
}
