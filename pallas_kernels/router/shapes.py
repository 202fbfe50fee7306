"""Shapes that drive the tests and the benchmark of router."""

from typing import NamedTuple

from pallas_kernels.router import Rule


class Shape(NamedTuple):
  """Sizes a case: N tokens, E experts, K chosen."""

  tokens: int
  experts: int
  top_k: int
  rule: Rule
  bias: bool


# All are shapes that the kernel takes.
TEST = {
  'v2_lite': Shape(70, 64, 6, Rule('softmax', normalize=False), False),
  'v2': Shape(5, 40, 3, Rule('softmax', 8, 3, 'max', False, 16.0), False),
  'v3': Shape(64, 64, 8, Rule('sigmoid', 8, 4, 'top2', True, 2.5), True),
  'v4': Shape(1, 48, 6, Rule('sqrtsoftplus', scale=1.5), True),
  'all': Shape(3, 8, 8, Rule('sigmoid'), False),
  # Experts in more than one piece of a warpgroup (of 64), groups across the
  # seams of pieces and of warpgroups.
  'v2_wide': Shape(3, 160, 6, Rule('softmax', 8, 3, 'max', False, 16.0), False),
  'top2_wide': Shape(3, 240, 8, Rule('sigmoid', 3, 2), True),
  'softmax_pieces': Shape(
    3, 320, 6, Rule('softmax', 5, 2, 'max', False, 16.0), False
  ),
  'top2_pieces': Shape(3, 384, 8, Rule('sigmoid', 6, 3), True),
  'v4_wide': Shape(3, 384, 6, Rule('sqrtsoftplus', scale=2.5), True),
}

BENCH = {
  'v3_t4096': Shape(
    4096, 256, 8, Rule('sigmoid', 8, 4, 'top2', True, 2.5), True
  ),
  'v3_decode_b128': Shape(
    128, 256, 8, Rule('sigmoid', 8, 4, 'top2', True, 2.5), True
  ),
  'v2_t8192': Shape(
    8192, 160, 6, Rule('softmax', 8, 3, 'max', False, 16.0), False
  ),
  'v4_pro_t8192': Shape(8192, 384, 6, Rule('sqrtsoftplus', scale=2.5), True),
  'v2_lite_t8192': Shape(8192, 64, 6, Rule('softmax', normalize=False), False),
}

# The most that the kernel takes, by registers or shared memory.
LIMITS = {
  'most_experts': Shape(256, 512, 8, Rule('softmax'), True),
  'most_groups': Shape(256, 416, 8, Rule('sigmoid', 16, 4), True),
  'most_chosen': Shape(256, 256, 170, Rule('sigmoid', 8, 8), True),
}
