"""The rope fields of a config.json <-> RopeConfig.

Old files hold `rope_theta` and `rope_scaling`, new ones `rope_parameters`
with both in one.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.model.attention.rope import (
  Llama3Config,
  RopeConfig,
  YarnConfig,
)

_YARN = {
  'factor': 'factor',
  'original_max_position_embeddings': 'original_length',
  'beta_fast': 'beta_fast',
  'beta_slow': 'beta_slow',
  'mscale': 'mscale',
  'mscale_all_dim': 'mscale_all_dim',
  'attention_factor': 'attention_factor',
}
_LLAMA3 = {
  'factor': 'factor',
  'low_freq_factor': 'low_factor',
  'high_freq_factor': 'high_factor',
  'original_max_position_embeddings': 'original_length',
}
_NEEDED = {
  'yarn': ('factor', 'original_max_position_embeddings'),
  'llama3': tuple(_LLAMA3),
}
_TYPES = {'llama': ('default', 'llama3')}


def parse(fields: Mapping[str, Any], family: str) -> RopeConfig:
  name = 'rope_parameters' if fields.get('rope_parameters') else 'rope_scaling'
  if fields.get('rope_parameters') and fields.get('rope_scaling'):
    raise InputError('config.json: has both rope_parameters and rope_scaling')
  found = dict(fields.get(name) or {})
  where = f'config.json: {name}'
  theta = found.pop('rope_theta', fields.get('rope_theta', 10000.0))
  kinds = {found.pop(key) for key in ('type', 'rope_type') if key in found}
  allowed = _TYPES.get(family, ('default', 'yarn'))
  kind = kinds.pop() if kinds else 'default'
  if kinds or kind not in allowed:
    raise InputError(f'{where}.rope_type = {kind!r}: must be one of {allowed}')
  interleaved = fields.get('rope_interleave', family != 'llama')
  if type(interleaved) is not bool:
    raise InputError(
      f'config.json: rope_interleave = {interleaved!r}: must be true or false'
    )
  return RopeConfig(
    theta=_number(f'{where}.rope_theta', theta),
    interleaved=interleaved,
    scaling=_scaling(kind, found, where),
  )


def _scaling(kind, found, where):
  if found.pop('truncate', True) is not True:
    raise InputError(f'{where}.truncate = False: not supported')
  if found.pop('partial_rotary_factor', 1) not in (1, None):
    raise InputError(f'{where}.partial_rotary_factor: not supported')
  table = {'default': {}, 'yarn': _YARN, 'llama3': _LLAMA3}[kind]
  for key, value in found.items():
    if key not in table:
      raise InputError(f'{where}.{key} = {value!r}: not understood for {kind}')
  for key in _NEEDED.get(kind, ()):
    if found.get(key) is None:
      raise InputError(f'{where}.{key}: missing; {kind} needs it')
  values = {
    table[key]: _number(f'{where}.{key}', value)
    for key, value in found.items()
    if value is not None and not (value == 0 and key.startswith('beta'))
  }
  if 'original_length' in values:
    values['original_length'] = int(values['original_length'])
  if kind == 'default':
    return None
  if kind == 'llama3':
    return Llama3Config(**values)
  # A file without these means something else than our default 1.0.
  return YarnConfig(**{'mscale': None, 'mscale_all_dim': None, **values})


def _number(where, value) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise InputError(f'{where} = {value!r}: must be a number')
  return float(value)


def render(rope: RopeConfig, family: str) -> dict[str, Any]:
  """rope_theta, rope_scaling, and the length that they were made for."""
  scaling = rope.scaling
  if family == 'llama' and rope.interleaved:
    raise InputError(
      'attention.rope.interleaved = True: llama files pair halves; use False'
    )
  kind, table = {
    type(None): ('default', {}),
    YarnConfig: ('yarn', _YARN),
    Llama3Config: ('llama3', _LLAMA3),
  }[type(scaling)]
  if kind not in _TYPES.get(family, ('default', 'yarn')):
    raise InputError(f'attention.rope.scaling: {family} files have no {kind}')
  out = {
    'rope_theta': rope.theta,
    'rope_scaling': None,
    'max_position_embeddings': 4096,
  }
  if scaling is None:
    return out
  values = {key: getattr(scaling, ours) for key, ours in table.items()}
  values = {key: value for key, value in values.items() if value is not None}
  # Both names: older readers know 'type', newer ones 'rope_type'.
  out['rope_scaling'] = {'type': kind, 'rope_type': kind, **values}
  out['max_position_embeddings'] = round(
    scaling.factor * scaling.original_length
  )
  return out
