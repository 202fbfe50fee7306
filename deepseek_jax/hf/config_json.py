"""Reads config.json into a TransformerConfig, every field accounted for.

Meanings follow the code released with the checkpoints; where transformers
departs from it, a comment in the family's module or in `rope_json` says so.
Every number is checked before it is used (see `config_limits`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax import trees
from deepseek_jax.config import from_dict
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields as fields_of
from deepseek_jax.hf import config_limits, families
from deepseek_jax.hf.config_limits import error as _error
from deepseek_jax.hf.families.family import Family
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import TransformerConfig


class Parsed(NamedTuple):
  """Holds what a config.json describes.

  Attributes:
    family: whose file it is.
    config: the model, with the MTP layers that the file has.
    carried: fields that don't change the model, to write again.
    quantization: its quantization_config, checked, or None.
    drafter: fields of a speculative drafter, which is not read.
  """

  family: Family
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
  family = families.named(fields.get('model_type'))
  config_limits.check_more(fields, family.limits)
  _check_architecture(fields.get('architectures'), family)
  drafter = ()
  if family.drafter:
    begins = family.drafter.fields
    drafter = tuple(sorted(n for n in fields if n.startswith(begins)))
    fields = {k: v for k, v in fields.items() if k not in drafter}
  _check_names(fields, family)
  config = _config(fields, family)
  config_limits.check_size(config)
  if drafter:
    # Tensors under mtp.* are the drafter's: there is no MTP layer beside it.
    config = without_mtp(config)
  carried = {k: v for k, v in fields.items() if is_carried(family, k)}
  return Parsed(family, config, carried, _quantization(fields), drafter)


def is_carried(family: Family, name: str) -> bool:
  """Returns whether a field changes no number of the family's models."""
  return fields_of.is_carried(name) or name in family.carried


def _check_architecture(named: Any, family: Family) -> None:
  """Raises InputError unless `architectures` is absent or the family's."""
  wanted = family.architecture
  if named not in (None, [wanted]):
    raise _error('architectures', named, f'must be [{wanted!r}]')


def _check_names(fields: Mapping[str, Any], family: Family) -> None:
  """Raises InputError for a field that is unknown or has a wrong value."""
  known = {*family.mapped, *family.special, *family.fixed, *fields_of.ALWAYS}
  known |= {f.also for f in family.mapped.values()}
  for name, value in fields.items():
    if name.startswith('_'):
      continue  # private notes of transformers: _name_or_path and the like
    if name not in known and not is_carried(family, name):
      fix = f'not understood for {family.model_type}; not supported'
      raise _error(name, value, fix)
    if name in family.fixed and value not in family.fixed[name]:
      fix = f'not supported; must be {family.fixed[name][0]!r}'
      raise _error(name, value, fix)


def _config(fields: Mapping[str, Any], family: Family) -> TransformerConfig:
  """Returns the model of fields whose names are checked."""
  try:
    values = {
      field.ours: fields_of.typed(fields, name, field)
      for name, field in family.mapped.items()
    }
    values |= family.parse(fields, values)
    nested = trees.nested(
      (path.split('.'), value)
      for path, value in values.items()
      if value is not None or not path.startswith('moe.')
    )
    return from_dict(TransformerConfig, nested)
  except InputError as error:
    # What our own classes refuse names our fields.
    text = str(error)
    text = text if text.startswith('config.json') else f'config.json: {text}'
    raise InputError(text) from None


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
