"""Reads fields of a config.json, and lists those that families share.

Every field is mapped to one of ours, or read together with others, or allowed
one value, or known not to change what the model computes. There is no fifth
kind: a field that a family's record doesn't list is an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.hf.config_limits import error, shown

REQUIRED = object()


class Field(NamedTuple):
  """Describes a field that determines what the model computes.

  Attributes:
    ours: dotted path in TransformerConfig.
    kind: of its value.
    default: where it is absent or null.
    also: another name that it is found under.
  """

  ours: str
  kind: type
  default: Any = REQUIRED
  also: str | None = None


COMMON = {
  'vocab_size': Field('vocab_size', int),
  'hidden_size': Field('dim', int),
  'intermediate_size': Field('ffn.width', int),
  'num_attention_heads': Field('attention.heads', int),
  'rms_norm_eps': Field('norm_eps', float),
  'initializer_range': Field('init_std', float, 0.02),
  'tie_word_embeddings': Field('tied', bool, False),
}
# Read by `config_json`, for every family.
ALWAYS = frozenset(
  {
    'model_type',
    'architectures',
    'quantization_config',
    'num_hidden_layers',
    'rope_theta',
    'rope_scaling',
    'rope_parameters',
    'max_position_embeddings',
  }
)
# Fields that may hold these values only: no other is implemented.
FIXED = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'attention_dropout': (0, None),
  'pretraining_tp': (1, None),
  'partial_rotary_factor': (1, None),
  'is_decoder': (False, True),
  'is_encoder_decoder': (False,),
  'add_cross_attention': (False,),
}
# Fields that change no number that the model computes from given weights.
CARRIED = frozenset(
  {
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
    'use_cache',
    'torch_dtype',
    'dtype',
    'transformers_version',
    'auto_map',
    'ep_size',
    'aux_loss_alpha',  # weights of training losses: a recipe, not the model
    'seq_aux',
    'output_router_logits',
    'output_attentions',
    'output_hidden_states',
    'return_dict',
    'chunk_size_feed_forward',
    'id2label',
    'label2id',
    'problem_type',
  }
)


def is_carried(name: str) -> bool:
  """Returns whether a field changes no number of any model."""
  # unsloth notes how it has loaded and repaired the tokenizer.
  return (
    name in CARRIED
    or name == 'max_position_embeddings'
    or name.startswith('unsloth_')
  )


def typed(fields: Mapping[str, Any], name: str, field: Field) -> Any:
  """Returns a field as its type; InputError where it is missing or another."""
  value = fields.get(name, REQUIRED)
  if field.also in fields:
    other = fields[field.also]
    if value not in (REQUIRED, other):
      raise error(name, value, f'contradicts {field.also} = {shown(other)}')
    name, value = field.also, other
  if value is REQUIRED or (value is None and field.default is not REQUIRED):
    value = field.default
  if value is REQUIRED:
    raise InputError(f'config.json: {name}: missing')
  ok = isinstance(value, field.kind) and (
    field.kind is bool or not isinstance(value, bool)
  )
  # JSON writers may drop the point: 1 is a float, too.
  if field.kind is float and type(value) is int:
    return float(value)
  if not ok:
    kind = getattr(field.kind, '__name__', str(field.kind))
    raise error(name, value, f'must be {kind}')
  return value


def integer(fields: Mapping[str, Any], name: str) -> int | None:
  """Returns a whole number, or None where it is absent."""
  value = fields.get(name)
  if value is not None and (type(value) is not int or value < 0):
    raise error(name, value, 'must be a whole number')
  return value


def needed(fields: Mapping[str, Any], name: str) -> int:
  """Returns a number whose absence libraries would fill in differently."""
  value = integer(fields, name)
  if value is None:
    raise InputError(f'config.json: {name}: missing')
  return value


def layers(fields: Mapping[str, Any]) -> int:
  """Returns the number of layers, at least 1."""
  count = integer(fields, 'num_hidden_layers')
  if not count:
    raise error('num_hidden_layers', count, 'must be at least 1')
  return count


def listed(fields: Mapping[str, Any], name: str, kind: type) -> list | None:
  """Returns a list of numbers or texts, or None."""
  value = fields.get(name)
  if value is not None and (
    not isinstance(value, list | tuple)
    or any(type(v) is not kind for v in value)
  ):
    raise error(name, value, f'must be a list of {kind.__name__}')
  return value


def heads(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns kv_heads and head_dim of grouped queries.

  Args:
    fields: of the file.
    values: of the mapped fields.
  """
  count = values['attention.heads']
  kv_heads = integer(fields, 'num_key_value_heads')
  dim = integer(fields, 'head_dim')
  if dim is None and count > values['dim']:
    raise error('num_attention_heads', count, 'is above hidden_size')
  return {
    'attention.kind': 'gqa',
    'attention.kv_heads': count if kv_heads is None else kv_heads,
    'attention.head_dim': values['dim'] // count if dim is None else dim,
  }


def compact(names: Sequence[str]) -> tuple:
  """Returns a layout of these blocks, with what repeats written once."""
  names, out, at = list(names), [], 0
  while at < len(names):
    # The pattern of at most 4 blocks whose repeats cover most layers.
    best = (1, 1)
    for width in range(1, 5):
      pattern, times = names[at : at + width], 1
      while names[at + times * width : at + (times + 1) * width] == pattern:
        times += 1
      if times > 1 and width * times > best[0] * best[1]:
        best = (width, times)
    width, times = best
    out.append((tuple(names[at : at + width]), times))
    at += width * times
  return tuple(out)
