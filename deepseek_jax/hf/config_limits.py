"""Limits what a downloaded config.json may hold, before it is used.

The file is anybody's: a number in it must neither start an allocation or a
loop of its own size nor make the model compute NaN. Limits are far above every
released model (a layer count of 1024, 16,384 experts), and each is an error
that names the field.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.transformer_config import TransformerConfig

FILE_BYTES = 16 << 20  # id2label of a classifier may be long
_DEPTH = 16
_VALUES = 1 << 20
_SHOWN = 80  # characters of a value in a message
PARAMETERS = 1e15  # a thousand times the largest released model


class Range(NamedTuple):
  """Holds the numbers from `low` to `high`; without `low` itself if `above`."""

  low: float
  high: float
  above: bool = False

  def __contains__(self, value: float) -> bool:
    """Returns whether a number is in the range; NaN is not."""
    return self.low < value <= self.high or (
      value == self.low and not self.above
    )

  def __str__(self) -> str:
    """Returns the range as the end of an error message."""
    first = f'above {self.low}' if self.above else f'at least {self.low}'
    return f'must be {first} and at most {self.high}'


_WIDTH = Range(1, 1 << 20)
_COUNT = Range(1, 1 << 14)
_LENGTH = Range(1, (1 << 31) - 1)
_POSITIVE = Range(0, 1e6, above=True)
_EPS = Range(1e-20, 1.0)  # smaller ones vanish in float32

# Objects whose fields have limits, beside the file itself.
_INSIDE = ('rope_scaling', 'rope_parameters', 'compress_rates')
# Carried along, so no reader checks the type.
_UNREAD = ('max_position_embeddings',)
LIMITS = {
  'vocab_size': Range(1, 1 << 24),
  'hidden_size': _WIDTH,
  'intermediate_size': Range(1, 1 << 22),
  'moe_intermediate_size': Range(1, 1 << 22),
  'max_position_embeddings': Range(1, 1 << 40),
  'num_hidden_layers': Range(1, 1024),
  'first_k_dense_replace': Range(0, 1 << 14),
  'num_nextn_predict_layers': Range(0, 64),
  'num_mtp_layers': Range(0, 64),
  'num_hash_layers': Range(0, 1024),
  'num_attention_heads': _COUNT,
  'num_key_value_heads': _COUNT,
  'head_dim': _COUNT,
  'qk_head_dim': _COUNT,
  'qk_nope_head_dim': _COUNT,
  'qk_rope_head_dim': Range(2, 1 << 14),
  'v_head_dim': _COUNT,
  'q_lora_rank': _WIDTH,
  'kv_lora_rank': _WIDTH,
  'n_routed_experts': _COUNT,
  'num_experts_per_tok': _COUNT,
  'n_shared_experts': Range(0, 1024),
  'n_group': _COUNT,
  'topk_group': _COUNT,
  'hc_mult': Range(1, 64),
  'hc_sinkhorn_iters': Range(0, 1000),
  'sliding_window': _LENGTH,
  'o_groups': _COUNT,
  'o_lora_rank': _WIDTH,
  'index_n_heads': _COUNT,
  'index_head_dim': _COUNT,
  'index_topk': _LENGTH,
  'compressed_sparse_attention': Range(1, 1 << 20),
  'heavily_compressed_attention': Range(1, 1 << 20),
  'rms_norm_eps': _EPS,
  'hc_eps': _EPS,
  'initializer_range': Range(0, 1e3),
  'routed_scaling_factor': _POSITIVE,
  'swiglu_limit': _POSITIVE,
  'rope_theta': Range(1, 1e30, above=True),
  'compress_rope_theta': Range(1, 1e30, above=True),
  'partial_rotary_factor': Range(0, 1, above=True),
  'factor': Range(1, 1e6),
  'original_max_position_embeddings': _LENGTH,
  'beta_fast': Range(0, 1e6),
  'beta_slow': Range(0, 1e6),
  'mscale': Range(0, 1e3),
  'mscale_all_dim': Range(0, 1e3),
  'attention_factor': Range(0, 1e3, above=True),
  'low_freq_factor': _POSITIVE,
  'high_freq_factor': _POSITIVE,
}


def shown(value: Any) -> str:
  """Returns a value as a message shows it: on one line, cut where long."""
  if isinstance(value, int) and abs(value) >= 1 << 128:
    return f'an integer of {value.bit_length()} bits'
  text = repr(value)
  return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'


def error(name: str, value: Any, fix: str) -> InputError:
  """Returns the error of a field."""
  plain = name if len(name) <= _SHOWN else name[:_SHOWN] + '...'
  return InputError(f'config.json: {plain} = {shown(value)}: {fix}')


def check(fields: Mapping[str, Any]) -> None:
  """Checks every value of a config.json, however deep.

  Raises:
    InputError: a number is not finite or outside of LIMITS, or the file is
      nested or filled beyond measure.
  """
  if not isinstance(fields, Mapping):
    raise InputError('config.json: holds no JSON object')
  # A list, not recursion: a hostile file may nest beyond Python's stack.
  left = [(str(name), name, value, 1) for name, value in fields.items()]
  seen = 0
  while left:
    path, name, value, depth = left.pop()
    seen += 1
    if seen > _VALUES or depth > _DEPTH:
      what = 'nested too deep' if depth > _DEPTH else 'too many values'
      raise InputError(f'config.json: {path[:_SHOWN]}: {what}')
    if depth == 1 or path.startswith(_INSIDE):
      _check_limit(path, LIMITS.get(name), value)
    if isinstance(value, Mapping):
      left += [(f'{path}.{k}', k, v, depth + 1) for k, v in value.items()]
    elif isinstance(value, list | tuple):
      left += [(path, None, v, depth + 1) for v in value]
    elif isinstance(value, float) and not math.isfinite(value):
      raise error(path, value, 'must be finite')
    elif isinstance(value, int) and abs(value) >= 1 << 63:
      raise error(path, value, 'must fit in 64 bits')


def check_more(fields: Mapping[str, Any], limits: Mapping[str, Range]) -> None:
  """Raises InputError unless a family's own numbers are in their limits."""
  for name, limit in limits.items():
    _check_limit(name, limit, fields.get(name))


def _check_limit(path: str, limit: Range | None, value: Any) -> None:
  """Raises InputError where a value is not a number in its range."""
  if limit is None or value is None:
    return
  if isinstance(value, bool) or not isinstance(value, int | float):
    if path in _UNREAD:
      raise error(path, value, 'must be a number')
    return  # its reader raises with the type that it must have
  if value not in limit:
    raise error(path, value, str(limit))


def check_size(config: TransformerConfig) -> None:
  """Raises InputError for a model beyond PARAMETERS; its fields are checked.

  The count is an upper bound.
  """
  D, layers = config.dim, config.layers + config.mtp.depth
  blocks = [b for s in config.segments() for b in s.blocks]
  if config.mtp.depth:
    blocks.append(config.block(config.mtp.block))
  layer = max(map(functools.partial(_block_size, D), blocks))
  total = layers * layer + 2 * config.vocab_size * D
  if total > PARAMETERS:
    experts = max(_sum(b.ffn, 'experts') for b in blocks)
    raise InputError(
      f'config.json: hidden_size = {D}, num_hidden_layers = {layers}, {experts}'
      f' experts ...: make up to {total:.0e} parameters; at most'
      f' {PARAMETERS:.0e} are read'
    )


def _block_size(dim: int, block: BlockConfig) -> int:
  """Returns an upper bound of the parameters of a layer."""
  a, ffn = block.attention, block.ffn
  # Every matrix of an attention maps one of these spaces to another.
  spaces = dim + _sum(a, 'q_rank', 'kv_rank')
  spaces += a.heads * _sum(a, 'head_dim', 'nope_dim', 'rope_dim', 'v_dim')
  spaces += _sum(a, 'groups') * _sum(a, 'o_rank')
  for index in (getattr(a, 'indexer', None), getattr(a, 'csa', None)):
    heads = _sum(index, 'heads', 'index_heads')
    spaces += heads * _sum(index, 'dim', 'index_dim')
  copies = _sum(ffn, 'experts', 'shared') or 1
  return 3 * dim * copies * ffn.width + 4 * spaces**2


def _sum(config: Any, *names: str) -> int:
  """Returns the sum of fields; one that is absent or None counts as 0."""
  return sum(getattr(config, name, None) or 0 for name in names)
