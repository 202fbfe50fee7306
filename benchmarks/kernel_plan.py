"""Lists what benchmarks.kernels times, the most valuable first.

A window on a GPU may be short. First comes what decides most about training
and serving DeepSeek-V3, one shape each; then its other shapes; then every
shape of the tables that is left, without contenders.
"""

import difflib
from typing import NamedTuple

from benchmarks import kernel_cases


class Case(NamedTuple):
  """One row: an op on a shape of its table, and who else computes it."""

  op: str
  shape: str
  contenders: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    return f'{self.op}/{self.shape}'

  @property
  def patience(self) -> float:
    """How many times the limit of a row it gets: whole models compile."""
    return 3.0 if self.op in ('train_step', 'engine_decode') else 1.0

  @property
  def target(self) -> tuple[str, float] | None:
    """A figure of the row and what it should reach, where one is set."""
    if self.op == 'mla_decode' and not self.shape.endswith('_h128'):
      return None
    return _TARGETS.get(self.op)


# Of an H100 or H200, as shares of the floor of the same run, or as stated.
_TARGETS = {
  'mla_decode': ('of_floor', 0.7),
  'mla_prefill': ('over_cudnn', 1.0),
  'grouped_matmul': ('of_floor', 0.85),
  'grouped_matmul_fp8': ('tflops', 1200.0),
  'permute': ('of_floor', 0.8),
  'combine': ('of_floor', 0.8),
  'quantize': ('of_floor', 0.8),
  'quantize_columns': ('of_floor', 0.8),
  'latent_kv': ('of_floor', 0.8),
  'sparse_mla': ('of_floor', 0.6),
  'indexer': ('of_floor', 0.6),
  'indexer_fp8': ('of_floor', 0.6),
}


_FIRST = (
  ('mla_prefill', 's4096_h128', 'cudnn'),
  ('grouped_matmul', 'g8_m4096_up', 'torch'),
  ('mla_decode', 'b128_kv4096_h128', 'flash_mla'),
  ('train_step', 'moe_1b4_t32768', 'xla'),
  ('engine_decode', 'v2_lite_l6_b64_kv4096', 'xla'),
  ('mla_prefill_bwd', 's4096_h128', 'cudnn'),
  ('grouped_matmul_bwd', 'g8_m4096_up', ''),
  ('grouped_matmul_fp8', 'g8_m4096_up', ''),
  ('sparse_mla', 'prefill_s4096', ''),
  ('sparse_mla', 'v4_csa_s8192', ''),
  ('attention_shares', 'prefill_s4096', 'xla'),
  ('sparse_gqa', 'nsa_selected_s8192', ''),
  ('compress', 'csa_t8192', 'xla'),
  ('compress_bwd', 'csa_t8192', 'xla'),
  ('indexer', 's8192_h64', ''),
  ('indexer_fp8', 's8192_h64', ''),
  ('index_candidates', 's65536_m128', 'xla'),
  ('permute', 'v3_t4096', 'xla'),
  ('combine', 'v3_t4096', 'xla'),
  ('router', 'v3_t4096', 'xla'),
  ('mla_decode_fp8', 'b128_kv4096_h128', ''),
  ('grouped_swiglu', 'g8_m4096_up', 'xla'),
  ('grouped_matmul', 'g256_m64_up', ''),
  ('mla_decode', 'b128_kv4096_h16', ''),
  ('mla_decode', 'b128_ragged_h128', ''),
  ('indexer', 'decode_b64_s2_kv65536', ''),
  ('indexer_fp8', 'decode_b64_s2_kv65536', ''),
  ('router', 'v3_decode_b128', 'xla'),
  ('quantize', 'act_t8192_d7168', 'xla'),
  ('quantize_columns', 'act_t8192_d7168', 'xla'),
  ('latent_kv', 'prefill_t8192', 'xla'),
  ('latent_kv', 'decode_b128', 'xla'),
  ('combine_bwd', 'v3_t4096', 'xla'),
  ('permute_fp8', 'v3_t4096', 'xla'),
  ('sparse_mla', 'decode_b64_s2_kv32768', ''),
  ('grouped_matmul_float8_bwd', 'g8_m4096_up', ''),
  ('sinkhorn', 'v4_t8192', 'xla'),
  ('sinkhorn_bwd', 'v4_t8192', 'xla'),
  ('permute_bwd', 'v3_t4096', 'xla'),
  ('sparse_mla_bwd', 'prefill_s4096', ''),
  ('mla_prefill', 's8192_h128_packed', ''),
)


def every_case() -> list[Case]:
  """All rows there are, in order of value."""
  first = [
    Case(op, shape, tuple(filter(None, names.split(','))))
    for op, shape, names in _FIRST
  ]
  seen = {(case.op, case.shape) for case in first}
  rest = [
    Case(op, shape)
    for op, (shapes, *_) in kernel_cases.OPS.items()
    for shape in shapes
    if (op, shape) not in seen
  ]
  return first + rest


def chosen(only: str) -> list[Case]:
  """The rows that --only names: ops or op/shape, with commas between.

  Raises:
    ValueError: a name that is none; tells the nearest.
  """
  cases = every_case()
  names = [name.strip() for name in only.split(',') if name.strip()]
  known = {case.op for case in cases} | {case.name for case in cases}
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
      hint = f'did you mean {near[0]}?' if near else f'ops: {sorted(known)}'
      raise ValueError(f'--only={name}: no such op or op/shape; {hint}')
  return [c for c in cases if not names or {c.op, c.name} & set(names)]
