"""Shapes that drive the tests and the benchmark of permute and combine."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: N tokens, K choices, E experts, D width, rows per block."""

  tokens: int
  choices: int
  experts: int
  dim: int
  block: int | None
  nowhere: float = 0.0  # share of the choices that go nowhere


TEST = {
  'plain': Shape(37, 3, 5, 16, 8),
  'one_token': Shape(1, 2, 32, 16, None),
  'few': Shape(8, 4, 6, 8, 1, nowhere=0.3),
  'single_rows': Shape(40, 3, 6, 8, 1, nowhere=0.2),
  'empty_experts': Shape(9, 1, 40, 8, 4),
  'one_expert': Shape(50, 1, 1, 8, 16),
  'nowhere': Shape(41, 4, 6, 8, 8, nowhere=0.4),
  'all_nowhere': Shape(5, 2, 4, 8, 8, nowhere=1.0),
  'training': Shape(300, 2, 4, 24, None, nowhere=0.1),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'plain': Shape(11, 3, 5, 256, 8, nowhere=0.3),
  'one_token': Shape(1, 2, 32, 512, 4),
  'all_nowhere': Shape(2, 2, 4, 256, 4, nowhere=1.0),
  'empty_experts': Shape(5, 1, 40, 256, 2),
  'in_parts': Shape(3, 2, 4, 2304, 3, nowhere=0.2),
}

# DeepSeek-V3: 256 experts, 8 choices, width 7168; V2-Lite: 64, 6, 2048.
BENCH = {
  'v3_t4096': Shape(4096, 8, 256, 7168, 128),
  'v3_decode_b128': Shape(128, 8, 256, 7168, 64),
  'v2_lite_t8192': Shape(8192, 6, 64, 2048, 128),
}
