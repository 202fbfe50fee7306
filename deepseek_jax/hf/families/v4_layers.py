"""Reads the layer pattern and the ropes of DeepSeek-V4's config.json.

Two spellings are read: the released one (compress_ratios, num_hash_layers,
rope_scaling) and that of transformers (layer_types, mlp_layer_types,
compress_rates, rope_parameters). What transformers would fill in for an absent
layer pattern is not the pattern of either released model, so it must be there.
Where a file has both, they must agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import rope_json
from deepseek_jax.hf.config_fields import integer, listed, needed
from deepseek_jax.hf.config_limits import error
from deepseek_jax.model.attention.rope import RopeConfig, YarnConfig

ROPES = ('default', 'yarn')
TYPES = {
  'window': 'sliding_attention',
  'csa': 'compressed_sparse_attention',
  'hca': 'heavily_compressed_attention',
}
_RATES = {'csa': 4, 'hca': 128}  # as released


def rates(fields: Mapping[str, Any]) -> dict[str, int]:
  """Returns how many tokens an entry has, by kind of layer."""
  given = dict(rope_json.mapping(fields, 'compress_rates'))
  out = {kind: given.pop(TYPES[kind], rate) for kind, rate in _RATES.items()}
  if given:
    raise error('compress_rates', fields['compress_rates'], 'unknown layers')
  for kind, value in out.items():
    if type(value) is not int:
      name = f'compress_rates.{TYPES[kind]}'
      raise error(name, value, 'must be a whole number')
  return out


def kinds(
  fields: Mapping[str, Any], count: int, tokens: Mapping[str, int]
) -> list[str]:
  """Returns the name of every layer's kind, as in `presets.v4_kinds`.

  Args:
    fields: of the file.
    count: of layers.
    tokens: of an entry, by kind.
  """
  by_type = _by_type(fields, count)
  by_ratio = _by_ratio(fields, count, tokens, by_type)
  if by_type is None and by_ratio is None:
    raise InputError('config.json: compress_ratios: missing')
  if by_type and by_ratio and by_type != by_ratio:
    ratios = fields['compress_ratios']
    raise error('compress_ratios', ratios, 'contradicts layer_types')
  hashed = _hashed(fields, count)
  return [k + '_hash' * h for k, h in zip(by_type or by_ratio, hashed)]


def _by_type(fields: Mapping[str, Any], count: int) -> list[str] | None:
  """Returns the kinds of layers by layer_types, or None."""
  types = listed(fields, 'layer_types', str)
  if types is None:
    return None
  names = {theirs: ours for ours, theirs in TYPES.items()}
  if len(types) != count or set(types) - set(names):
    fix = f'must name a known kind for each of {count} layers'
    raise error('layer_types', types, fix)
  return [names[t] for t in types]


def _by_ratio(
  fields: Mapping[str, Any],
  count: int,
  tokens: Mapping[str, int],
  types: Sequence[str] | None,
) -> list[str] | None:
  """Returns the kinds of layers by compress_ratios, or None.

  Ratios don't tell kinds of one ratio apart: `types` do, where they are given.
  """
  ratios = listed(fields, 'compress_ratios', int)
  if ratios is None:
    return None
  # MTP layers follow in the list; they have a window alone.
  if any(ratios[count:]):
    raise error('compress_ratios', ratios, 'layers after the last must be 0')
  if tokens['csa'] == tokens['hca'] and any(ratios) and types is None:
    fix = 'does not tell layers of one ratio apart; give layer_types'
    raise error('compress_ratios', ratios, fix)
  if types is not None and ratios[:count] == [tokens.get(t, 0) for t in types]:
    return list(types)
  names = {0: 'window'} | {tokens[k]: k for k in ('csa', 'hca')}
  if len(ratios) < count or set(ratios) - set(names):
    fix = f'must name a known kind for each of {count} layers'
    raise error('compress_ratios', ratios, fix)
  return [names[r] for r in ratios[:count]]


def _hashed(fields: Mapping[str, Any], count: int) -> list[bool]:
  """Returns which layers choose experts by token."""
  types = listed(fields, 'mlp_layer_types', str)
  if types is None:
    hashed = needed(fields, 'num_hash_layers')
    return [i < hashed for i in range(count)]
  if len(types) < count or set(types) - {'hash_moe', 'moe'}:
    raise error('mlp_layer_types', types, 'must be hash_moe or moe per layer')
  out = [t == 'hash_moe' for t in types[:count]]
  first = integer(fields, 'num_hash_layers')
  if first is not None and out != [i < first for i in range(count)]:
    raise error('num_hash_layers', first, 'contradicts mlp_layer_types')
  return out


def rope_dim(fields: Mapping[str, Any], head_dim: int) -> int:
  """Returns how many channels are rotated, given outright or as a share."""
  dim, share = (
    fields.get(n) for n in ('qk_rope_head_dim', 'partial_rotary_factor')
  )
  if dim is not None:
    dim = needed(fields, 'qk_rope_head_dim')
  if share is not None:
    return _shared(share, 'partial_rotary_factor', head_dim, dim)
  if dim is None:
    raise InputError('config.json: qk_rope_head_dim: missing')
  return dim


def _shared(share: Any, name: str, head_dim: int, dim: int | None) -> int:
  """Returns the channels that a share of a head makes.

  Args:
    share: of the channels.
    name: of its field.
    head_dim: of a head.
    dim: what it has to be, or None.
  """
  if isinstance(share, bool) or not isinstance(share, int | float):
    raise error(name, share, 'must be a number')
  exact = head_dim * share
  counted = round(exact)
  # Files have the quotient of two whole numbers, rounded to a float or so.
  if abs(exact - counted) > 1e-4:
    raise error(name, share, f'makes {exact:.6g} of {head_dim} channels')
  if dim not in (None, counted):
    fix = f'makes {counted} of {head_dim} channels, not {dim}'
    raise error(name, share, fix)
  return counted


def ropes(
  fields: Mapping[str, Any], head_dim: int, dim: int
) -> tuple[RopeConfig, RopeConfig]:
  """Returns ropes of layers with a window alone, and of those with entries.

  Args:
    fields: of the file.
    head_dim: of a head.
    dim: of its rotated channels.
  """
  name, flat = rope_json.only(fields)
  if 'main' not in flat and 'compress' not in flat:
    # The object is that of layers with entries, apart from the base.
    near = rope_json.base(fields, 'rope_theta', flat, name, 10000.0)
    far = rope_json.base(fields, 'compress_rope_theta', {}, name, 160000.0)
    _take_share(flat, name, head_dim, dim)
    return RopeConfig(near), _rope(far, flat, name)
  out = []
  for key, outer, default in (
    ('main', 'rope_theta', 10000.0),
    ('compress', 'compress_rope_theta', 160000.0),
  ):
    where = f'{name}.{key}'
    if not isinstance(flat.get(key), Mapping):
      raise error(where, flat.get(key), 'must be an object')
    found = dict(flat.pop(key))
    theta = rope_json.base(fields, outer, found, where, default)
    _take_share(found, where, head_dim, dim)
    out.append(_rope(theta, found, where))
  for key, value in flat.items():
    if value not in (fields[name][k].get(key) for k in ('main', 'compress')):
      fix = 'not understood beside main and compress'
      raise error(f'{name}.{key}', value, fix)
  near, far = out
  if near.scaling is not None:
    raise error(f'{name}.main', fields[name]['main'], 'must be default')
  return near, far


def _take_share(found: dict, where: str, head_dim: int, dim: int) -> None:
  """Takes a share of rotated channels out of an object, after checking it."""
  share = found.pop('partial_rotary_factor', None)
  if share is not None:
    _shared(share, f'{where}.partial_rotary_factor', head_dim, dim)


def _rope(theta: float, found: Mapping[str, Any], where: str) -> RopeConfig:
  """Returns a rope as the released code computes it."""
  scaling = rope_json.scaling(found, where, ROPES)
  if scaling is not None:
    # The released code multiplies cos and sin by nothing, whatever mscale says.
    factor = scaling.attention_factor
    scaling = YarnConfig(
      factor=scaling.factor,
      original_length=scaling.original_length,
      beta_fast=scaling.beta_fast,
      beta_slow=scaling.beta_slow,
      mscale=None,
      mscale_all_dim=None,
      attention_factor=1.0 if factor is None else factor,
    )
  return RopeConfig(theta=theta, interleaved=True, scaling=scaling)
