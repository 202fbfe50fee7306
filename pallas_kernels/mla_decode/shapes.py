"""Shapes that drive the tests and the benchmark of mla_decode."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: B lengths, T new tokens, H heads, page size, splits."""

  lengths: tuple[int, ...]
  new: int
  heads: int
  page: int
  splits: int | None = None


# The kernel takes these too, so the interpreter runs them.
TEST = {
  'one_token': Shape((1,), 1, 16, 64),
  'ragged_two_splits': Shape((200, 64, 3), 1, 16, 64, 2),
  'speculative': Shape((130,), 4, 32, 64, 1),
  'more_splits_than_blocks': Shape((70,), 2, 16, 128, 3),
  'blocks_by_turns': Shape((330, 449), 1, 16, 64, 1),
  'shorter_than_new': Shape((2,), 4, 16, 64, 1),
}


def _v3(batch: int, length: int, new: int, heads: int) -> Shape:
  """Returns the shape of requests of one length in pages of 64 tokens."""
  return Shape((length,) * batch, new, heads, 64)


BENCH = {
  'b128_kv4096_h128': _v3(128, 4096, 1, 128),
  'b128_kv4096_h128_s2': _v3(128, 4096, 2, 128),
  'b128_kv8192_h128': _v3(128, 8192, 1, 128),
  'b128_kv32768_h128': _v3(128, 32768, 1, 128),
  'b128_kv4096_h16': _v3(128, 4096, 1, 16),
  'b4_kv32768_h128': _v3(4, 32768, 1, 128),
  'b128_ragged_h128': Shape(tuple(range(64, 8256, 64)), 1, 128, 64),
}
