"""Renders a TransformerConfig as config.json.

What no family of files can express is an error that names the field of ours.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields, config_json, families
from deepseek_jax.model.transformer_config import TransformerConfig


def render(
  config: TransformerConfig, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the config.json of a model.

  Args:
    config: of the model.
    carried: further fields, which change no number of the model.

  Raises:
    InputError: names the field of ours that no family can express, or the
      carried one that changes the model.
  """
  family = families.of(config)
  carried = dict(carried or {})
  for name in carried:
    if not config_json.is_carried(family, name):
      known = sorted(config_fields.CARRIED | family.carried)
      raise InputError(f'{name}: not one of the fields {known}')
  out = {
    'model_type': family.model_type,
    'architectures': [family.architecture],
  }
  for name, field in family.mapped.items():
    value = _reach(config, field.ours)
    if value is not config_fields.REQUIRED:
      out[name] = value
  out['num_hidden_layers'] = config.layers
  return out | family.render(config) | carried


def _reach(config: TransformerConfig, path: str) -> Any:
  """Returns the value at a dotted path, REQUIRED where a part of it is None."""
  for key in path.split('.'):
    if config is None:
      return config_fields.REQUIRED
    config = getattr(config, key)
  return config
