"""A model with adapters as the plain model that computes the same."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.model import given, lora
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig


def merged(
  config: TransformerConfig, variables: Mapping[str, Any]
) -> tuple[TransformerConfig, Mapping[str, Any]]:
  """Returns a configuration without `lora`, and variables with it folded in.

  Args:
    config: of the model.
    variables: {'params': ..., 'buffers': ...}; without adapters they are
      returned as they are.

  Raises:
    InputError: the variables are none, or have adapters, and the configuration
      has none.
  """
  given.variables({'params': None}, variables)
  params = variables['params']
  if config.lora is None:
    if lora.holds(params):
      raise InputError(
        'variables: hold adapters, but config.lora is None; give the'
        ' configuration that the model was trained with'
      )
    return config, variables
  without = dataclasses.replace(config, lora=None)
  made = lora.adapters(build(without).abstract['params'], config.lora)
  params = lora.folded(params, made, config.lora.scale)
  return without, {**variables, 'params': params}
