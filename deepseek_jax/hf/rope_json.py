"""Converts the rope fields of a config.json from and to RopeConfig.

Old files hold `rope_theta` and `rope_scaling`, new ones `rope_parameters`
with both in one.

YaRN where mscale and mscale_all_dim are not both given and above 0: the code
that DeepSeek released takes 1 and 0 for what is absent and multiplies cos and
sin by (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1), so by
0.1 mscale ln(factor) + 1 without mscale_all_dim. transformers takes both or
neither, and without multiplies by 0.1 ln(factor) + 1. `model.attention.rope`
follows transformers here, with which such files are served; for mscale = 1 or
absent, without mscale_all_dim, they agree. With both, as in the released files
of V2 to V3.2, the two codes agree, and in both mscale_all_dim alone sets the
softmax scale.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf.config_limits import error
from deepseek_jax.model.attention.rope import (
  LinearConfig,
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
_LINEAR = {'factor': 'factor'}
_NEEDED = {
  'linear': ('factor',),
  'yarn': ('factor', 'original_max_position_embeddings'),
  'llama3': tuple(_LLAMA3),
}


def mapping(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """Returns a field that must hold an object; {} if it is absent or null."""
  found = fields.get(name)
  if found is None:
    return {}
  if not isinstance(found, Mapping):
    raise error(name, found, 'must be an object')
  return found


def parse(
  fields: Mapping[str, Any], kinds: Sequence[str], *, interleaved: bool
) -> RopeConfig:
  """Returns the rotary embedding of a config.json.

  Args:
    fields: of the file.
    kinds: of scaling that the family has: 'default' (none), 'yarn' ...
    interleaved: which channels are paired; see RopeConfig.

  Raises:
    InputError: a field is not understood; names field and value.
  """
  name, found = only(fields)
  theta = base(fields, 'rope_theta', found, name, 10000.0)
  return RopeConfig(theta, interleaved, scaling(found, name, kinds))


def only(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Returns the one object that describes the rope, and its name.

  Raises:
    InputError: there are both, which may contradict each other.
  """
  given = {n: mapping(fields, n) for n in ('rope_parameters', 'rope_scaling')}
  if all(given.values()):
    raise InputError('config.json: has both rope_parameters and rope_scaling')
  name = 'rope_parameters' if given['rope_parameters'] else 'rope_scaling'
  return name, dict(given[name])


def base(
  fields: Mapping[str, Any],
  outer: str,
  found: dict[str, Any],
  name: str,
  default: float,
) -> float:
  """Takes the base of the frequencies out of `found`, or reads it beside.

  Args:
    fields: of the file.
    outer: the field of the file that has it.
    found: the object that may have it too, as 'rope_theta'.
    name: of that object.
    default: where neither has.

  Raises:
    InputError: it is no number, or they contradict each other.
  """
  inner = found.pop('rope_theta', None)
  given = fields.get(outer)
  if inner is None:
    return _number(outer, default if given is None else given)
  inner = _number(f'{name}.rope_theta', inner)
  if given is not None and _number(outer, given) != inner:
    raise error(outer, given, f'contradicts {name}.rope_theta = {inner}')
  return inner


def _kind(found: dict, name: str, allowed: Sequence[str]) -> str:
  """Takes the kind of scaling out of `found`, under either of its names."""
  kind = 'default'
  for i, key in enumerate(k for k in ('type', 'rope_type') if k in found):
    value = found.pop(key)
    if value not in allowed or (i and value != kind):
      raise error(f'{name}.{key}', value, f'must be one of {tuple(allowed)}')
    kind = value
  return kind


def scaling(
  found: Mapping[str, Any], name: str, kinds: Sequence[str]
) -> YarnConfig | Llama3Config | LinearConfig | None:
  """Returns the scaling of an object; InputError for what is not understood.

  Args:
    found: the object, without rope_theta.
    name: of it, for messages.
    kinds: that the family has.
  """
  found = dict(found)
  kind = _kind(found, name, kinds)
  truncate = found.pop('truncate', True)
  if truncate is not True:
    raise error(f'{name}.truncate', truncate, 'not supported')
  partial = found.pop('partial_rotary_factor', 1)
  if partial not in (1, None):
    raise error(f'{name}.partial_rotary_factor', partial, 'not supported')
  tables = {'yarn': _YARN, 'llama3': _LLAMA3, 'linear': _LINEAR}
  table = tables.get(kind, {})
  for key, value in found.items():
    if key not in table:
      raise error(f'{name}.{key}', value, f'not understood for {kind}')
  for key in _NEEDED.get(kind, ()):
    if found.get(key) is None:
      raise InputError(f'config.json: {name}.{key}: missing; {kind} needs it')
  values = {
    table[key]: _number(f'{name}.{key}', value)
    for key, value in found.items()
    if value is not None and not (value == 0 and key.startswith('beta'))
  }
  if 'original_length' in values:
    length = values['original_length']
    if not length.is_integer():
      key = 'original_max_position_embeddings'
      raise error(f'{name}.{key}', found[key], 'must be a whole number')
    values['original_length'] = int(length)
  if kind == 'default':
    return None
  if kind == 'linear':
    return LinearConfig(**values)
  if kind == 'llama3':
    if values['low_factor'] >= values['high_factor']:
      low = found['low_freq_factor']
      raise error(
        f'{name}.low_freq_factor', low, 'must be below high_freq_factor'
      )
    return Llama3Config(**values)
  # A file without these means something else than our default 1.0.
  return YarnConfig(**{'mscale': None, 'mscale_all_dim': None, **values})


def _number(name: str, value: Any) -> float:
  """Returns a value as a float; InputError unless it is a number."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise error(name, value, 'must be a number')
  return float(value)


def render(
  rope: RopeConfig, kinds: Sequence[str], model_type: str
) -> dict[str, Any]:
  """Returns rope_theta, rope_scaling, and the length they were made for.

  Args:
    rope: ours.
    kinds: of scaling that the family has.
    model_type: of the family, for messages.
  """
  slowed = rope.scaling
  kind, table = {
    type(None): ('default', {}),
    YarnConfig: ('yarn', _YARN),
    Llama3Config: ('llama3', _LLAMA3),
    LinearConfig: ('linear', _LINEAR),
  }[type(slowed)]
  if kind not in kinds:
    raise InputError(
      f'attention.rope.scaling: {model_type} files have no {kind}'
    )
  out = {
    'rope_theta': rope.theta,
    'rope_scaling': None,
    'max_position_embeddings': 4096,
  }
  if slowed is None:
    return out
  values = {key: getattr(slowed, ours) for key, ours in table.items()}
  values = {key: value for key, value in values.items() if value is not None}
  # Both names: older readers know 'type', newer ones 'rope_type'.
  out['rope_scaling'] = {'type': kind, 'rope_type': kind, **values}
  # Linear scaling does not record which length it extends.
  length = getattr(slowed, 'original_length', 4096)
  out['max_position_embeddings'] = round(slowed.factor * length)
  return out
