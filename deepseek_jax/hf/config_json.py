"""Reads config.json into a TransformerConfig, every field accounted for.

Meanings follow the code released with the checkpoints; where transformers
departs from it, a comment here or in `rope_json` says so. Every number is
checked before it is used (see `config_limits`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax import trees
from deepseek_jax.config import from_dict
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields as fields_of
from deepseek_jax.hf import config_limits, rope_json
from deepseek_jax.hf.config_limits import error as _error
from deepseek_jax.hf.families import v4 as v4_config
from deepseek_jax.hf.families import v32
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.presets import layout


class Parsed(NamedTuple):
  """Holds what a config.json describes.

  Attributes:
    config: the model, with the MTP layers that the file has.
    carried: fields that don't change the model, to write again.
    quantization: its quantization_config, checked, or None.
    drafter: fields of a speculative drafter, which is not read.
  """

  config: TransformerConfig
  carried: dict[str, Any]
  quantization: dict[str, Any] | None
  drafter: tuple[str, ...] = ()


def parse(fields: Mapping[str, Any]) -> Parsed:
  """Returns the model of a config.json, with what else the file has.

  Raises:
    InputError: a field is not understood; names field and value.
  """
  # Limits first: no unchecked number may size anything.
  config_limits.check(fields)
  config_limits.check_size(fields)
  family = fields_of.family(fields.get('model_type'))
  _check_architecture(fields.get('architectures'), family)
  if family == 'deepseek_v4':
    return _parse_v4(fields)
  _check_names(fields, family)
  values = {
    field.ours: _typed(fields, name, field)
    for name, field in fields_of.MAPPED[family].items()
  }
  values['attention.rope'] = rope_json.parse(fields, family)
  if family == 'llama':
    values |= _grouped_query(fields, values)
  else:
    values |= _latent(fields, values, family)
  config = _build(values)
  carried = {k: v for k, v in fields.items() if fields_of.is_carried(k)}
  return Parsed(config, carried, _quantization(fields))


def _parse_v4(fields: Mapping[str, Any]) -> Parsed:
  """Returns what a V4 file describes; fields of a drafter are left out."""
  drafter = tuple(sorted(filter(v4_config.of_drafter, fields)))
  fields = {k: v for k, v in fields.items() if k not in drafter}
  if drafter:
    # Tensors under mtp.* are the drafter's: there is no MTP layer beside it.
    fields['num_nextn_predict_layers'] = 0
  v4_config.check_names(fields)
  carried = {
    k: v
    for k, v in fields.items()
    if fields_of.is_carried(k) or k in v4_config.CARRIED
  }
  config = v4_config.parse(fields)
  return Parsed(config, carried, _quantization(fields), drafter)


def _check_architecture(named: Any, family: str) -> None:
  """Raises InputError unless `architectures` is absent or the family's."""
  wanted = fields_of.ARCHITECTURES[family]
  if named not in (None, [wanted]):
    raise _error('architectures', named, f'must be [{wanted!r}]')


def _check_names(fields: Mapping[str, Any], family: str) -> None:
  """Raises InputError for a field that is unknown or has a wrong value."""
  fixed = fields_of.FIXED | fields_of.FIXED_OF[family]
  known = {
    *fields_of.MAPPED[family],
    *fields_of.SPECIAL[family],
    *fields_of.ALWAYS,
    *fields_of.CARRIED,
    *fixed,
  }
  if family != 'llama':
    known |= {'head_dim', 'qk_head_dim', 'num_key_value_heads'}
  for name, value in fields.items():
    if name.startswith('_'):
      continue  # private notes of transformers: _name_or_path and the like
    if name not in known and not fields_of.is_carried(name):
      raise _error(name, value, f'not understood for {family}; not supported')
    if name in fixed and value not in fixed[name]:
      raise _error(name, value, f'not supported; must be {fixed[name][0]!r}')


def _typed(fields: Mapping[str, Any], name: str, field: fields_of.Field) -> Any:
  """Returns a field as its type; InputError where it is missing or another."""
  value = fields.get(name, field.default)
  if value is fields_of.REQUIRED:
    raise InputError(f'config.json: {name}: missing')
  ok = isinstance(value, field.kind) and (
    field.kind is bool or not isinstance(value, bool)
  )
  # JSON writers may drop the point: 1 is a float, too.
  if field.kind is float and type(value) is int:
    return float(value)
  if not ok:
    kind = getattr(field.kind, '__name__', str(field.kind))
    raise _error(name, value, f'must be {kind}')
  return value


def _needed(fields: Mapping[str, Any], name: str) -> int:
  """Returns a number whose absence libraries would fill in differently."""
  value = _integer(fields, name)
  if value is None:
    raise InputError(f'config.json: {name}: missing')
  return value


def _integer(fields: Mapping[str, Any], name: str) -> int | None:
  """Returns a whole number, or None where it is absent."""
  value = fields.get(name)
  if value is not None and (type(value) is not int or value < 0):
    raise _error(name, value, 'must be a whole number')
  return value


def _grouped_query(
  fields: Mapping[str, Any], values: Mapping[str, Any]
) -> dict:
  """Returns the fields of a Llama: grouped-query attention, dense layers."""
  heads = values['attention.heads']
  kv_heads = _integer(fields, 'num_key_value_heads')
  head_dim = _integer(fields, 'head_dim')
  return {
    'attention.kind': 'gqa',
    'attention.kv_heads': heads if kv_heads is None else kv_heads,
    'attention.head_dim': _head_dim(values) if head_dim is None else head_dim,
    'layout': layout(_layers(fields), 0),
  }


def _head_dim(values: Mapping[str, Any]) -> int:
  """Returns the head dimension that hidden_size and heads give."""
  heads = values['attention.heads']
  if heads > values['dim']:
    raise _error('num_attention_heads', heads, 'is above hidden_size')
  return values['dim'] // heads


def _layers(fields: Mapping[str, Any]) -> int:
  """Returns the number of layers, at least 1."""
  layers = _integer(fields, 'num_hidden_layers')
  if not layers:
    raise _error('num_hidden_layers', layers, 'must be at least 1')
  return layers


def _latent(
  fields: Mapping[str, Any], values: Mapping[str, Any], family: str
) -> dict:
  """Returns the fields of latent attention, layout, MTP and router."""
  derived = {
    'num_key_value_heads': values['attention.heads'],
    'head_dim': values['attention.rope_dim'],
    'qk_head_dim': values['attention.nope_dim'] + values['attention.rope_dim'],
  }
  for name, value in derived.items():
    if fields.get(name) not in (None, value):
      raise _error(name, fields[name], f'not supported; must be {value}')
  layers = _layers(fields)
  dense = min(_needed(fields, 'first_k_dense_replace'), layers)
  mtp = _mtp_depth(fields, family)
  sparse = family == v32.FAMILY
  if sparse:
    v32.check_layers(fields, layers, dense)
  out = {
    'attention.kind': 'dsa' if sparse else 'mla',
    'layout': layout(dense, layers - dense),
    'mtp.depth': mtp,
    'moe.shared': values['moe.shared'] or 0,
  }
  out |= _v2_router(fields, values) if family == 'deepseek_v2' else _v3(fields)
  if dense == layers and not mtp:  # a MoE that no layer uses
    drop = {k: None for k in values | out if k.startswith('moe.')}
    return out | drop | {'moe': None}
  return out


def _mtp_depth(fields: Mapping[str, Any], family: str) -> int:
  """Returns the number of multi-token prediction layers."""
  if family == 'deepseek_v2':
    return 0
  names = ('num_nextn_predict_layers', 'num_mtp_layers')
  depths = {_integer(fields, n) or 0 for n in names if n in fields}
  if len(depths) > 1:
    raise _error(names[0], fields[names[0]], f'contradicts {names[1]}')
  return depths.pop() if depths else 0


def _v2_router(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict:
  """Returns the router fields of V2: softmax, greedy or limited by groups."""
  method = fields.get('topk_method', 'greedy')
  if method not in ('greedy', 'group_limited_greedy'):
    raise _error(
      'topk_method', method, 'must be greedy or group_limited_greedy'
    )
  grouped = method == 'group_limited_greedy'
  out = {
    'moe.router.scoring': 'softmax',
    'moe.router.bias': False,
    'moe.router.group_score': 'max',
    'moe.router.groups': _needed(fields, 'n_group') if grouped else 1,
    'moe.router.top_groups': _needed(fields, 'topk_group') if grouped else 1,
  }
  # V2's released code normalises in place of scaling, and only above one
  # expert; transformers reads the field and ignores it.
  if values['moe.router.normalize']:
    one = values['moe.top_k'] == 1
    out['moe.router.normalize'] = not one
    out['moe.router.scale'] = values['moe.router.scale'] if one else 1.0
  return out


def _v3(fields: Mapping[str, Any]) -> dict:
  """Returns the router fields of V3: sigmoid, selection bias, groups."""
  return {
    'moe.router.scoring': 'sigmoid',
    'moe.router.bias': True,
    'moe.router.group_score': 'top2',
    'moe.router.groups': _needed(fields, 'n_group'),
    'moe.router.top_groups': _needed(fields, 'topk_group'),
  }


def _build(values: Mapping[str, Any]) -> TransformerConfig:
  """Returns the configuration of values by dotted path."""
  nested = trees.nested(
    (path.split('.'), value)
    for path, value in values.items()
    if value is not None or not path.startswith('moe.')
  )
  try:
    return from_dict(TransformerConfig, nested)
  except InputError as error:
    raise InputError(f'config.json: {error}') from None


def _quantization(fields: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the quantization_config, checked; None without one."""
  found = fields.get('quantization_config')
  if found is None:
    return None
  if not isinstance(found, Mapping):
    raise _error('quantization_config', found, 'must be an object')
  allowed = {
    'quant_method': ('fp8',),
    'fmt': ('e4m3', None),
    'activation_scheme': ('dynamic', None),
    'scale_fmt': ('ue8m0', 'float', None),
    'weight_block_size': None,
    # Each weight's dtype decides whether it is quantised.
    'modules_to_not_convert': None,
    'dequantize': None,
  }
  # The method first: it explains why the rest is not understood.
  for name, value in {'quant_method': None, **found}.items():
    if name not in allowed:
      raise _error(f'quantization_config.{name}', value, 'not supported')
    if allowed[name] and value not in allowed[name]:
      fix = f'not supported; must be {allowed[name][0]!r}'
      raise _error(f'quantization_config.{name}', value, fix)
  block = found.get('weight_block_size')
  if (
    not isinstance(block, list)
    or len(block) != 2
    or not all(type(b) is int and b > 0 for b in block)
  ):
    raise _error(
      'quantization_config.weight_block_size', block, 'must be like [128, 128]'
    )
  return dict(found)


def without_mtp(config: TransformerConfig) -> TransformerConfig:
  """Returns the model without its multi-token prediction."""
  return dataclasses.replace(config, mtp=MTPConfig(depth=0))
