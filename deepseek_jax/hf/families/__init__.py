"""Holds one module per family of Hugging Face checkpoints.

A new family is a module here with a FAMILY, and its line in the list below.
"""

import importlib
from typing import Any

from deepseek_jax import own_classes
from deepseek_jax.config import kind_name, to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_limits
from deepseek_jax.hf.families.family import Family
from deepseek_jax.model.transformer_config import TransformerConfig

# The first that fits a model is the one that it is written as.
FAMILIES: tuple[Family, ...] = tuple(
  importlib.import_module(f'{__name__}.{module}').FAMILY
  for module in (
    'llama',
    'qwen3_moe',
    'v2',
    'v3',
    'v32',
    'v4',
  )
)


def named(model_type: Any) -> Family:
  """Returns the family that a model_type names; InputError if none is read."""
  for family in FAMILIES:
    if model_type in (family.model_type, *family.aliases):
      return family
  known = [name for f in FAMILIES for name in (f.model_type, *f.aliases)]
  raise config_limits.error('model_type', model_type, f'must be one of {known}')


def of(config: TransformerConfig) -> Family:
  """Returns the family whose files hold a model.

  Raises:
    InputError: none does. A user's own class is named: what it computes is in
      no family, whatever its arrays.
  """
  for where, kind in own_classes.kinds(to_dict(config)).items():
    raise InputError(
      f'{where} = {kind}: no Hugging Face family has it; it can be saved only'
      ' as a checkpoint of this library'
    )
  for family in FAMILIES:
    if family.fits(config):
      return family
  known = '; '.join(f'{f.model_type} ({f.about})' for f in FAMILIES)
  raise InputError(
    f'{_described(config)}: no Hugging Face family here holds it; known are'
    f' {known}'
  )


def _described(config: TransformerConfig) -> str:
  """Returns what decides on the family of a model."""
  parts = [f'attention = {kind_name(type(config.attention))}']
  if getattr(config.attention, 'qk_norm', False):
    parts.append('qk_norm')
  parts.append('experts' if config.moe is not None else 'dense layers')
  if config.mtp.depth:
    parts.append('mtp')
  return ' with '.join([parts[0], ' and '.join(parts[1:])])
