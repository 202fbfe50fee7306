"""Shapes that drive the tests and the benchmark of sparse_mla."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Sizes a case: B rows, T queries, S cached tokens, H heads, K chosen."""

  batch: int
  queries: int
  keys: int
  heads: int
  top_k: int
  nothing: float = 0.0  # share of the choices that are none
  width: int = 512  # C
  rope: int = 64  # R; 0 for none
  far: tuple[int, int] | None = None  # S and K of a second list
  sinks: bool = False


TEST = {
  'one_key': Shape(1, 1, 1, 2, 1),
  'plain': Shape(2, 5, 17, 3, 6),
  'some_none': Shape(1, 7, 12, 2, 9, nothing=0.4),
  'all_none': Shape(1, 2, 4, 2, 3, nothing=1.0),
}

# Of `attend`: one list or two, with a rotary part and sinks or without.
TEST_LISTS = {
  'two_lists': Shape(2, 4, 9, 3, 5, 0.3, 12, 4, (7, 3)),
  'sinks': Shape(1, 3, 9, 2, 5, 0.3, 12, 4, None, True),
  'v4': Shape(2, 3, 9, 2, 4, 0.3, 12, 0, (5, 3), True),
  'sinks_alone': Shape(1, 2, 4, 2, 3, 1.0, 12, 0, (5, 2), True),
}

# The kernel takes these, so the interpreter runs them.
TEST_GPU = {
  'plain': Shape(2, 3, 90, 64, 70, nothing=0.2),
  'few_heads': Shape(1, 2, 20, 16, 5),
  'one_key': Shape(1, 1, 1, 16, 1),
  'all_none': Shape(1, 2, 8, 16, 3, nothing=1.0),
  # More blocks and more heads than are in flight at once.
  'refilled': Shape(1, 1, 200, 80, 190, nothing=0.1),
  # DeepSeek-V4: a window and entries, a block of each empty for some queries.
  'v4': Shape(2, 2, 150, 16, 100, 0.2, 512, 0, (90, 70), True),
  'v4_sinks_alone': Shape(1, 2, 8, 16, 3, 1.0, 512, 0, (5, 2), True),
  'two_lists': Shape(1, 2, 80, 16, 65, 0.5, 512, 64, (70, 64)),
  # Few queries: thread blocks share what each chooses, one ends in a part.
  'split': Shape(1, 1, 300, 80, 290, nothing=0.1),
  'split_none': Shape(1, 1, 300, 16, 290, nothing=1.0),
  # As sparse_gqa packs NSA's keys and values.
  'narrow': Shape(1, 1, 90, 16, 70, 0.2, 256),
  'narrow_no_rope': Shape(1, 1, 90, 16, 70, 0.2, 256, 0),
}

# DeepSeek-V3.2: 128 heads, 2048 of the tokens. V4: 512 of the entries beside a
# window of 128, or (HCA) all entries of 128 tokens each.
BENCH = {
  'prefill_s4096': Shape(1, 4096, 4096, 128, 2048),
  'decode_b64_s2_kv32768': Shape(64, 2, 32768, 128, 2048),
  'decode_b2_s2_kv32768': Shape(2, 2, 32768, 128, 2048),
  'v4_csa_s8192': Shape(1, 8192, 8192, 128, 128, 0, 512, 0, (2048, 512), True),
  'v4_hca_s8192': Shape(1, 8192, 8192, 128, 128, 0, 512, 0, (64, 64), True),
  'v4_decode_b64': Shape(64, 1, 128, 128, 128, 0, 512, 0, (16384, 512), True),
}
